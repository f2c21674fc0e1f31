"""What may be unpickled: DeepSpeed's own files, as it writes them, and nothing that would run code."""

import os
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from learner.pickles import check_pickles


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with one file, which holds what DeepSpeed's own hold."""
    (tmp_path / "step-000003" / "deepspeed").mkdir(parents=True)
    state = {"module": {"w": torch.ones(3)}, "loss_scaler": LossScaler(1.0), "stage": ZeroStageEnum.gradients}
    torch.save(state, tmp_path / "step-000003" / "deepspeed" / "mp_rank_00_model_states.pt")
    return tmp_path / "step-000003"


def file_of(folder: Path) -> Path:
    return folder / "deepspeed" / "mp_rank_00_model_states.pt"


def test_what_deepspeed_writes_passes(folder):
    check_pickles(folder)


def test_a_pickle_that_would_run_code_is_refused_and_never_run(folder, tmp_path):
    torch.save({"module": Hostile(f"touch {tmp_path}/was-run")}, file_of(folder))
    with pytest.raises(ValueError, match=rf"would run \w+\.system when it is read.*remove {folder} to resume"):
        check_pickles(folder)
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.95], ids=["empty", "half", "without its end"])
def test_a_file_that_was_cut_off_is_named(folder, kept):
    whole = file_of(folder).read_bytes()
    file_of(folder).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"mp_rank_00_model_states\.pt is damaged"):
        check_pickles(folder)


def test_a_bare_pickle_is_not_a_file_of_deepspeed(folder):
    file_of(folder).write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match="is no file of DeepSpeed"):
        check_pickles(folder)
