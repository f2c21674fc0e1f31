"""DeepSpeed behind a small door: the only file that imports it.

A learner rank needs few verbs: ``logits``, ``backward``, ``step``, ``all_reduce``, ``gather``, ``save``, ``load``. What
DeepSpeed needs to be told for them to mean the same under every ZeRO stage is written down here:

- **Gradients.** DeepSpeed averages over ranks. The losses of all ranks *add up* to the loss of the minibatch
  (denominators are global), so each is multiplied by the number of ranks before its backward pass.
- **Accumulation** is not counted by DeepSpeed: the caller says which backward pass is the last one of a minibatch.
- **A step whose gradient norm is not finite is discarded** on all ranks alike, by DeepSpeed for stages 1 to 3 and here
  for stage 0, which would apply it.
- **bfloat16 with stage 0 runs as stage 1**: the same update, and stage 0 knows no float32 master weights.
- **On a CPU nothing is compiled.** Left alone, `init_distributed` builds a C++ extension for reductions in shared
  memory at run time: it takes a compiler and a minute and a half, and gloo does the same work.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.import_utils import is_flash_attn_2_available

from learner.archives import check_archives
from learner.checkpoint import damaged
from learner.collate import PackedRow
from learner.config import LearnerConfig
from learner.pickles import check_pickles
from r2vpo.records import TensorSpec

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["DS_ACCELERATOR"] = "cpu"  # read once, when deepspeed is imported

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine  # noqa: E402

Made = TypeVar("Made")

_TAG = "deepspeed"
_ROUNDING, _NEAR = 1e-4, 0.25
_NOISE_SETTINGS = ("dropout", "pdrop", "jitter")


class StepResult(NamedTuple):
    """What became of an optimiser step."""

    grad_norm: float
    """Norm of the gradient before clipping."""
    applied: bool
    """False if the gradient was not finite: the weights and the optimiser are as before."""


def init_distributed(*, rank: int, world_size: int, address: str, port: int, timeout_s: float) -> None:
    """Join the process group of the learner's ranks: gloo on CPUs, nccl on GPUs. Once per process."""
    _silence()
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK="0", MASTER_ADDR=address, MASTER_PORT=str(port)
    )
    if not ON_GPU:
        # No extension counts as buildable: the module docstring says why. Finding out would start compilers, too.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
    deepspeed.init_distributed(
        dist_backend="nccl" if ON_GPU else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )


class LearnerEngine:
    """The model and its optimiser on one rank; all ranks call every method together, in the same order.

    ``ValueError`` if the model cannot be trained on packed rows.
    """

    def __init__(self, config: LearnerConfig, *, model_path: str) -> None:
        """``model_path`` is a directory in Hugging Face format or the id of a model on its hub."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda" if ON_GPU else "cpu")
        self._dtype = _dtype(config)
        stage = 1 if config.zero_stage == 0 and self._dtype == torch.bfloat16 else config.zero_stage
        self._stage = stage
        self._grad_clip = config.grad_clip
        model = _load_model(config, model_path, self._dtype)
        generation = model.generation_config
        assert generation is not None, "a causal language model has a generation config"
        self.vocab_size: int = model.config.vocab_size
        self.special_ids = _flat_ids(generation.bos_token_id, generation.eos_token_id, generation.pad_token_id)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self._tensors = _untied_tensors(model)
        self.tensors = tuple(_spec(name, tensor) for name, tensor in self._tensors.items())
        self._model = model
        self._optimizer, self._engine = self._wrap(model, config)
        self._explicit_mask = False
        self._explicit_mask = self._needs_explicit_mask(model_path)

    @property
    def dtype(self) -> str:
        """``float32`` or ``bfloat16``: the type of the weights that compute."""
        return str(self._dtype).removeprefix("torch.")

    def logits(self, row: PackedRow) -> Tensor:
        """Logits ``[N, vocabulary]`` at ``row.index_N``, before any temperature, with a gradient where that is on."""
        inputs = {"input_ids": row.token_ids_T[None], "position_ids": row.position_ids_T[None]}
        if self._explicit_mask:
            inputs["attention_mask"] = _block_causal_mask(row.position_ids_T, self._dtype)
        return self._engine(**inputs, use_cache=False, logits_to_keep=row.index_N).logits[0]

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradient of one micro-batch; ``last`` says that an optimiser step follows."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        """Clip the accumulated gradient and move the weights, unless the gradient is not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage > 0:
            self._engine.step()
            norm = self._engine.get_global_grad_norm()
            assert norm is not None, "DeepSpeed is set up to measure the norm"
            return StepResult(float(norm), self._engine.was_step_applied())
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._grad_clip)
        applied = bool(norm.isfinite())
        if applied:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return StepResult(float(norm), applied)

    def all_reduce(self, values: Tensor) -> None:
        """Replace ``values`` by their sum over all ranks."""
        dist.all_reduce(values)

    def has_finite_weights(self) -> bool:
        """Whether all weights of all ranks are finite numbers; one pass over them, without a copy."""
        own = [p.ds_tensor if self._stage == 3 else p.detach() for p in self._model.parameters()]  # type: ignore[attr-defined]
        # Smallest and largest: a NaN anywhere makes both of them NaN.
        extremes = torch.stack([extreme.float() for shard in own for extreme in torch.aminmax(shard)])
        broken = (~extremes.isfinite()).sum()
        self.all_reduce(broken)
        return not broken

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def gather(self, names: Sequence[str], use: Callable[[dict[str, Tensor]], Made]) -> Made | None:
        """What ``use`` makes of some of `tensors` on rank 0; None on the other ranks, which must take part.

        The tensors are the live ones, there until ``use`` returns: it copies what it keeps, and waits for nobody. All
        ranks are through with the collective when this returns: rank 0 may take its time with what it got.
        """
        wanted = [self._tensors[name] for name in names]
        parameters = [t for t in wanted if isinstance(t, torch.nn.Parameter)]
        with deepspeed.zero.GatheredParameters(parameters, enabled=self._stage == 3):
            made = use(dict(zip(names, wanted, strict=True))) if self.rank == 0 else None
        self.barrier()
        return made

    def texts(self, own: str) -> list[str]:
        """What every rank says, by rank."""
        said = [""] * self.world_size
        dist.all_gather_object(said, own)
        return said

    def save(self, directory: Path) -> str:
        """Write weights and optimiser state below ``directory``; every rank writes its part.

        Returns what kept this rank from it, and "" if nothing did; never raises for that, since the others wait.
        """
        self._engine.checkpoint_engine = writer = _Writer()
        self._engine.save_checkpoint(str(directory), tag=_TAG, save_latest=False)
        return writer.failure

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, exactly, into an engine that has not stepped yet. See `learner.pickles`.

        The settings of the optimiser are those of this engine, not the saved ones. ``ValueError`` if a file is
        damaged, or is not DeepSpeed's own.
        """
        check_pickles(directory / _TAG)
        check_archives(directory / _TAG, rank=self.rank, world_size=self.world_size)
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        try:
            path, _ = self._engine.load_checkpoint(str(directory), tag=_TAG)
        # What torch says of a file that is cut off or overwritten; KeyError of one that holds something else.
        except (OSError, EOFError, RuntimeError, UnpicklingError, AssertionError, KeyError) as error:
            raise damaged(directory / _TAG, f"{type(error).__name__}: {_first_line(error)}") from error
        if path is None:
            raise damaged(directory / _TAG, "no state of the optimiser and the weights in it")
        for group, settings in zip(self._optimizer.param_groups, groups, strict=True):
            group.update(settings)

    def _wrap(self, model: PreTrainedModel, config: LearnerConfig) -> tuple[torch.optim.Optimizer, Any]:
        settings = _deepspeed_settings(config, self._stage, self._dtype)
        if self._stage == 3:
            # Shards the parameters one by one, so that a GPU never holds the whole model; the buffers stay behind.
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.device)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        # It would put a script beside every checkpoint that nobody needs, and fail where there is no room for it.
        engine._copy_recovery_script = lambda save_path: None
        # Noise is off in the model's config; training mode is what switches gradient checkpointing on.
        engine.train()
        return optimizer, engine

    @torch.no_grad()
    def _needs_explicit_mask(self, model_path: str) -> bool:
        """Whether position ids that restart do not keep packed sequences apart, so that a mask must.

        Most models of transformers build the mask from them, some ignore them (OPT, Falcon), and some would need other
        means altogether (state-space models). Two short sequences tell: packed, their log-probs must be far closer to
        those they have apart than to those of one long sequence.
        """
        tokens_T = torch.arange(7, device=self.device) % self.vocab_size
        parts = tokens_T.split([3, 4])
        apart = torch.cat([self._all_logprobs(part) for part in parts])
        leaking = (self._all_logprobs(tokens_T) - apart).abs().mean()
        for self._explicit_mask in (False, True):
            try:
                gap = (self._all_logprobs(*parts) - apart).abs().mean()
            except (RuntimeError, TypeError, ValueError):  # it takes no such mask
                break
            if gap <= max(_ROUNDING, _NEAR * leaking):
                return self._explicit_mask
        raise ValueError(
            f"model.path={model_path}: {type(self._model).__name__} lets trajectories that share a forward pass see "
            "each other, whether position ids or a mask separate them; choose a model with standard attention "
            "(Llama, Qwen, Mistral, Gemma, …)"
        )

    def _all_logprobs(self, *parts: Tensor) -> Tensor:
        """Log-probs ``[T, vocabulary]`` after every token of the sequences ``parts``, packed into one row."""
        tokens_T = torch.cat(parts)
        row = PackedRow(
            token_ids_T=tokens_T,
            position_ids_T=torch.cat([torch.arange(len(part), device=self.device) for part in parts]),
            index_N=torch.arange(len(tokens_T), device=self.device),
            target_N=tokens_T,
        )
        return self.logits(row).float().log_softmax(-1)


class _Writer(TorchCheckpointEngine):
    """Remembers the first thing that it could not write and goes on without it.

    Between its writes DeepSpeed waits for all ranks: an error of one would leave the others waiting forever.
    """

    def __init__(self) -> None:
        super().__init__()
        self.failure = ""

    def save(self, state_dict: Any, path: str) -> None:
        if not self.failure:
            try:
                # Given a path, torch would write by itself, and not say what the system says.
                with open(path, "wb") as file:
                    torch.save(state_dict, file)
            except (OSError, RuntimeError) as error:
                reason = error.__context__ if isinstance(error.__context__, OSError) else error
                self.failure = f"{path}: {_first_line(reason)}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if not self.failure:
            try:
                super().makedirs(path, exist_ok=exist_ok)
            except OSError as error:
                self.failure = _first_line(error)


def _first_line(error: BaseException) -> str:
    """What an error says, as far as it fits into a sentence of ours."""
    return shorten((str(error).splitlines() or [""])[0], 160, placeholder=" …")


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in main memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _dtype(config: LearnerConfig) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if ON_GPU else torch.float32
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def _load_model(config: LearnerConfig, model_path: str, dtype: torch.dtype) -> PreTrainedModel:
    local = Path(model_path).is_dir()
    model_config = AutoConfig.from_pretrained(model_path, local_files_only=local, trust_remote_code=False)
    noise = {
        key: 0.0
        for key, value in model_config.to_dict().items()
        if isinstance(value, float) and any(word in key for word in _NOISE_SETTINGS)
    }
    model_config.update(noise)
    attention = config.attention
    if attention == "auto":
        flash = ON_GPU and dtype == torch.bfloat16 and is_flash_attn_2_available()
        attention = "flash_attention_2" if flash else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        model_path,
        config=model_config,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=local,
        trust_remote_code=False,
        use_safetensors=True,  # otherwise it would take pickled weights where there are no others
    )
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _deepspeed_settings(config: LearnerConfig, stage: int, dtype: torch.dtype) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.grad_clip if stage > 0 else 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    if dtype == torch.bfloat16:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _block_causal_mask(position_ids_T: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[1, 1, T, T]``: 0 where a token may look, the type's lowest value elsewhere."""
    sequence_T = (position_ids_T == 0).cumsum(0)
    visible_TT = (sequence_T[:, None] == sequence_T[None]).tril()
    mask_TT = torch.zeros(visible_TT.shape, dtype=dtype, device=visible_TT.device)
    return mask_TT.masked_fill_(~visible_TT, torch.finfo(dtype).min)[None, None]


def _untied_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict's tensors; of those that are tied, one tensor under several names, the first name."""
    first: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), (name, tensor))
    return dict(first.values())


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))


def _flat_ids(*ids: int | list[int] | None) -> frozenset[int]:
    return frozenset(i for entry in ids if entry is not None for i in (entry if isinstance(entry, list) else [entry]))


def _silence() -> None:
    """Errors only: the learner's words are its metrics, and both libraries are talkative at every step."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
