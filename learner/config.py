"""Settings of the learner group."""

from __future__ import annotations

from dataclasses import dataclass, field

from r2vpo.checks import require


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """The DeepSpeed learner group: how large a step is, and how it is computed."""

    ranks: int = 1
    """Data-parallel ranks, one Ray actor each."""
    steps: int = 100
    """Learner steps of the run."""
    groups_per_step: int = 32
    """Groups in one batch, fresh and stale together."""
    minibatches: int = 4
    """Optimiser steps per pass over the batch; each sees its share of it."""
    passes: int = 1
    """Passes over the batch of a learner step; it ends sooner once its budget is used up (algorithm.end_early)."""
    lr: float = 1e-6
    """Nominal learning rate of AdamW, before warm-up and step control; 0 trains nothing, and every weight sync must
    then show the same canary gap."""
    warmup_steps: int = 10
    """Optimiser steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.95
    """Decay of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    grad_clip: float = 1.0
    """Largest norm of a gradient."""
    zero_stage: int = 0
    """DeepSpeed ZeRO stage: 0 replicates, 1 shards the optimiser, 2 also gradients, 3 also parameters."""
    dtype: str = "auto"
    """Type the model is trained in: `float32`, `bfloat16`, or `auto` for bfloat16 on GPU and float32 on CPU."""
    micro_batch_tokens: int = 4096
    """Tokens packed into one forward pass on one rank; a longer trajectory gets a pass of its own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    attention: str = "auto"
    """`sdpa`, `flash_attention_2`, or `auto`: flash attention where it is installed and there is a GPU."""
    bucket_mb: float = 256.0
    """Size (MiB) of one bucket of published weights."""
    weight_transport: str = "object_store"
    """How weights reach the workers: `object_store` (workers may come, go and be replaced), or `nccl`, a broadcast from
    GPU to GPU to a fleet that stays as it starts."""
    sync_every: int = 1
    """Learner steps between two publications of the weights; the last step's are always published."""
    checkpoint_every: int = 50
    """Learner steps between checkpoints; 0 writes only the last one."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept; the run can be resumed at any of them."""
    keep_every: int = 0
    """Besides, keep every checkpoint whose step is a multiple of this, for good (learner steps); 0 keeps none."""
    max_bad_steps: int = 10
    """Learner steps in a row without an optimiser step that could be applied; more of them stop the run."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves per rank."""
    num_gpus: float | None = None
    """GPUs that Ray reserves per rank; null is one where Ray has GPUs, else none."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources that each rank reserves, such as `{learner: 1}`: it runs only where they are declared."""
    omp_threads: int = 1
    """CPU threads per rank when it runs on the CPU."""
    step_timeout_s: float = 1800.0
    """Seconds a learner step may take."""

    def __post_init__(self) -> None:
        for key in (
            "ranks",
            "steps",
            "groups_per_step",
            "minibatches",
            "passes",
            "micro_batch_tokens",
            "keep_checkpoints",
            "sync_every",
        ):
            require.at_least(f"learner.{key}", getattr(self, key), 1)
        require.at_least("learner.lr", self.lr, 0.0)
        for key in ("adam_eps", "grad_clip", "bucket_mb", "step_timeout_s"):
            require.positive(f"learner.{key}", getattr(self, key))
        require.at_least("learner.warmup_steps", self.warmup_steps, 0)
        require.at_least("learner.checkpoint_every", self.checkpoint_every, 0)
        require.at_least("learner.keep_every", self.keep_every, 0)
        require.at_least("learner.max_bad_steps", self.max_bad_steps, 0)
        require.at_least("learner.weight_decay", self.weight_decay, 0.0)
        require.at_least("learner.omp_threads", self.omp_threads, 1)
        require.share("learner.adam_beta1", self.adam_beta1)
        require.share("learner.adam_beta2", self.adam_beta2)
        require.at_least("learner.num_cpus", self.num_cpus, 0.0)
        if self.num_gpus is not None:
            require.at_least("learner.num_gpus", self.num_gpus, 0.0)
        require.between("learner.zero_stage", self.zero_stage, 0, 3)
        require.one_of("learner.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        require.one_of("learner.weight_transport", self.weight_transport, ("object_store", "nccl"))
        require.one_of("learner.attention", self.attention, ("auto", "sdpa", "flash_attention_2"))
        if self.minibatches > self.groups_per_step:
            raise ValueError(
                f"learner.minibatches={self.minibatches} exceeds learner.groups_per_step={self.groups_per_step}: "
                "a minibatch needs at least one group; lower minibatches or raise groups_per_step"
            )

    def publishes(self, version: int) -> bool:
        """Whether workers get the weights of ``version``: every ``sync_every``-th, and the last one."""
        return version % self.sync_every == 0 or version == self.steps
