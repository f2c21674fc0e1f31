"""What the pickled files of a checkpoint would run, found without running it.

DeepSpeed unpickles its files, and a pickle may call anything that can be imported. torch can list what one names beyond
the tensors and containers that it takes for harmless; what DeepSpeed itself writes names three classes of its own. A
file that names anything else was put there by somebody else, and is refused before it is opened.
"""

from __future__ import annotations

from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

WRITTEN_BY_DEEPSPEED = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


def check_pickles(directory: Path) -> None:
    """``ValueError`` if a file below ``directory`` is damaged, or names what DeepSpeed does not write."""
    for file in sorted(directory.rglob("*.pt")):
        try:
            foreign = set(get_unsafe_globals_in_checkpoint(str(file))) - WRITTEN_BY_DEEPSPEED
        except (RuntimeError, ValueError, OSError):  # torch's words for a file that is no whole archive of its own
            raise ValueError(
                f"{file} is damaged, or is no file of DeepSpeed; remove {_checkpoint_of(file)} to resume from the "
                "checkpoint before it"
            ) from None
        if foreign:
            raise ValueError(
                f"{file} would run {min(foreign)} when it is read, which DeepSpeed does not write: it is not this "
                f"run's own, and is refused; remove {_checkpoint_of(file)} to resume from the checkpoint before it"
            )


def _checkpoint_of(file: Path) -> Path:
    """The directory ``step-NNNNNN`` that the file lies in, or else its own directory."""
    return next((parent for parent in file.parents if parent.name.startswith("step-")), file.parent)
