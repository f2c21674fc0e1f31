"""Settings of the task and of the rollout workers."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from r2vpo.checks import require

POOL_FIELDS = ("workers", "num_cpus", "num_gpus", "tensor_parallel_size", "resources", "labels", "spot")
"""What one of `RolloutConfig.pools` may set for itself."""
EVAL_SET_FIELDS = ("path", "split", "prompt_field", "truth_field")
"""What one of `TaskConfig.eval_sets` may set for itself."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Where prompts and verdicts come from."""

    name: str = "arithmetic"
    """`arithmetic` (procedural) or `dataset` (JSONL, Parquet, or a Hugging Face dataset)."""
    path: str | None = None
    """Dataset: a .jsonl or .parquet file, or the id of a Hugging Face dataset."""
    eval_path: str | None = None
    """Dataset: held-out file for evaluation; null keeps the last `eval_prompts` rows of `path` out of training."""
    split: str = "train"
    """Dataset: split of a Hugging Face dataset."""
    prompt_field: str = "prompt"
    """Dataset: field with the prompt's text."""
    truth_field: str = "answer"
    """Dataset: field with the ground truth."""
    prompt_template: str = "{prompt}"
    """Text shown to the policy; `{prompt}` is replaced by the prompt's field."""
    chat: bool = False
    """Wrap the prompt as a user message in the tokenizer's chat template."""
    reward: str | None = None
    """`module:function` that scores `(response, truth)`; null takes the task's own (dataset: math-verify)."""
    reward_deadline_s: float = 10.0
    """Seconds a single verdict may take before its process is killed."""
    reward_memory_mb: int = 2048
    """MiB of memory that a process computing verdicts and all it starts may hold before they are killed."""
    reward_processes: int = 1
    """Processes per rollout worker that compute verdicts."""
    eval_prompts: int = 512
    """Held-out prompts of an evaluation, and the most of every set in `eval_sets`."""
    eval_sets: dict[str, Any] = field(default_factory=dict)
    """Dataset: further held-out sets by name, each with its own accuracy: a file, the id of a Hugging Face dataset,
    or a mapping of `path` and, where they differ from the task's, `split`, `prompt_field` and `truth_field`."""
    eval_every: int = 0
    """Learner steps between evaluations during the training, which wait for it; 0 is before and after it only."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the task itself; arithmetic: `digits`, `num_prompts`."""

    def __post_init__(self) -> None:
        require.one_of("task.name", self.name, ("arithmetic", "dataset"))
        require.positive("task.reward_deadline_s", self.reward_deadline_s)
        require.at_least("task.reward_memory_mb", self.reward_memory_mb, 64)
        require.at_least("task.reward_processes", self.reward_processes, 1)
        require.at_least("task.eval_prompts", self.eval_prompts, 1)
        for key, value in (
            ("prompt_field", self.prompt_field),
            ("truth_field", self.truth_field),
            ("split", self.split),
        ):
            if not value.strip():
                raise ValueError(f"task.{key} is empty; name a {'split' if key == 'split' else 'field'} of the dataset")
        require.at_least("task.eval_every", self.eval_every, 0)
        if self.name == "dataset" and not self.path:
            raise ValueError(
                "task.name=dataset needs task.path: a .jsonl or .parquet file, or a Hugging Face dataset id"
            )
        if self.reward is not None and self.reward.count(":") != 1:
            raise ValueError(f"task.reward={self.reward} must have the form module:function")
        if self.eval_sets and self.name != "dataset":
            raise ValueError(
                f"task.eval_sets names {', '.join(self.eval_sets)}, but task.name={self.name} has none beside its own; "
                "remove them, or set task.name=dataset"
            )
        for name in self.eval_sets:
            self.eval_set(name)

    def eval_set(self, name: str) -> TaskConfig:
        """The task whose rows are those of ``eval_sets[name]``. ``ValueError`` if that is not well-formed."""
        key, given = f"task.eval_sets.{name}", self.eval_sets[name]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{key}: a set's name has letters, digits, `.`, `_` and `-` only, since metrics carry it")
        fields = {"path": given} if isinstance(given, str) else given
        if not isinstance(fields, dict) or not isinstance(fields.get("path"), str):
            raise ValueError(f"{key} must be a path or dataset id, or a mapping with such a path, not {given!r}")
        for field_name, value in fields.items():
            if field_name not in EVAL_SET_FIELDS or not isinstance(value, str):
                raise ValueError(f"{key}.{field_name}={value!r} is not one of {', '.join(EVAL_SET_FIELDS)}, as text")
        return replace(self, eval_sets={}, eval_path=None, **fields)


@dataclass(frozen=True, kw_only=True)
class AutoscaleConfig:
    """How many rollout workers the run may choose to have, so that the learner hardly waits."""

    min: int = 1
    """Fewest rollout workers."""
    max: int = 0
    """Most rollout workers; 0 keeps their number as it is set, and as `r2vpo scale` changes it."""

    def __post_init__(self) -> None:
        require.at_least("rollout.autoscale.min", self.min, 1)
        require.at_least("rollout.autoscale.max", self.max, 0)
        if self.is_on and self.max < self.min:
            raise ValueError(
                f"rollout.autoscale.max={self.max} is less than rollout.autoscale.min={self.min}; raise max, lower "
                "min, or set max to 0 for a fixed number of workers"
            )

    @property
    def is_on(self) -> bool:
        """Whether the run chooses."""
        return self.max > 0


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The rollout workers: how many, how they sample, what each engine may use."""

    workers: int = 1
    """Rollout workers, each with its own vLLM engine."""
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    """Bounds within which the run itself adds and drains workers."""
    group_size: int = 8
    """Trajectories per prompt."""
    max_tokens: int = 512
    """Longest response (tokens); a longer one is cut and counted as `truncated`."""
    temperature: float = 1.0
    """Sampling temperature; it is part of the behaviour distribution."""
    top_p: float = 1.0
    """Must be 1: nucleus sampling truncates the behaviour distribution and biases the ratio."""
    top_k: int = 0
    """Must be 0 (off), for the same reason."""
    min_p: float = 0.0
    """Must be 0 (off), for the same reason."""
    groups_in_flight: int = 8
    """Groups that one worker generates at the same time."""
    max_model_len: int = 2048
    """Longest prompt + response of the engine (tokens)."""
    dtype: str = "auto"
    """Type of the engine's weights: `float32`, `bfloat16`, `float16`, or `auto`: the model's on GPU, float32 on CPU."""
    kv_cache_gb: float | None = 0.25
    """GiB of KV cache per engine; null lets vLLM take `gpu_memory_utilization` of the GPU."""
    gpu_memory_utilization: float = 0.85
    """Share of the GPU's memory that one engine may use."""
    tensor_parallel_size: int = 1
    """GPUs per engine."""
    enforce_eager: bool = False
    """Skip compilation and CUDA graphs; always so on CPU."""
    prefix_caching: bool = False
    """Share KV between prompts with a common prefix; entries never outlive their weight version."""
    num_cpus: float = 1.0
    """CPUs that Ray reserves per worker."""
    num_gpus: float | None = None
    """GPUs that Ray reserves per worker; null is one per tensor-parallel rank where Ray has GPUs, else none."""
    resources: dict[str, float] = field(default_factory=dict)
    """Custom Ray resources that each worker reserves, such as `{rollout: 1}`: it runs only where they are declared."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels that a worker's Ray node must have, such as `{market: spot}`; `ray start --labels` declares them."""
    spot: bool = False
    """Workers live on machines that may be taken away: their deaths do not count towards `supervisor.max_restarts`."""
    pools: dict[str, Any] = field(default_factory=dict)
    """Workers that differ, by the name of their pool: mappings of `workers` and, where they differ from the settings
    here, `num_cpus`, `num_gpus`, `tensor_parallel_size`, `resources`, `labels`, `spot`; `workers` here is their sum."""
    omp_threads: int = 1
    """CPU threads of an engine that runs on the CPU."""
    start_timeout_s: float = 600.0
    """Seconds an engine may take to start."""

    def __post_init__(self) -> None:
        require.at_least("rollout.workers", self.workers, 1)
        if self.autoscale.is_on and not self.autoscale.min <= self.workers <= self.autoscale.max:
            raise ValueError(
                f"rollout.workers={self.workers} lies outside rollout.autoscale.min={self.autoscale.min} to "
                f"max={self.autoscale.max}; the run begins with workers: set it within these bounds"
            )
        require.at_least("rollout.max_tokens", self.max_tokens, 1)
        require.positive("rollout.temperature", self.temperature)
        require.at_least("rollout.groups_in_flight", self.groups_in_flight, 1)
        require.one_of("rollout.dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        require.at_least("rollout.tensor_parallel_size", self.tensor_parallel_size, 1)
        require.at_least("rollout.omp_threads", self.omp_threads, 1)
        require.positive("rollout.start_timeout_s", self.start_timeout_s)
        require.between("rollout.gpu_memory_utilization", self.gpu_memory_utilization, 0.01, 1.0)
        require.at_least("rollout.num_cpus", self.num_cpus, 0.0)
        if self.num_gpus is not None:
            require.at_least("rollout.num_gpus", self.num_gpus, 0.0)
        if self.kv_cache_gb is not None:
            require.positive("rollout.kv_cache_gb", self.kv_cache_gb)
        if self.group_size < 2:
            raise ValueError(
                f"rollout.group_size={self.group_size} gives no group-relative advantage: one has nothing to "
                "compare with; set rollout.group_size to 2 or more"
            )
        for key, value, off in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, 0), ("min_p", self.min_p, 0.0)):
            if value != off:
                raise ValueError(
                    f"rollout.{key}={value} truncates the sampling distribution, and the policy ratio would be biased: "
                    f"remove it (rollout.{key}={off}) and use rollout.temperature instead"
                )
        if self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"rollout.max_tokens={self.max_tokens} leaves no room for a prompt in "
                f"rollout.max_model_len={self.max_model_len}; lower max_tokens or raise max_model_len"
            )
        for name in self.pools:
            self._pool(name)
        num_pooled = sum(pool.workers for pool in self.by_pool.values())
        if num_pooled != self.workers:
            raise ValueError(
                f"rollout.workers={self.workers} is not the sum of rollout.pools, which have {num_pooled}; set workers "
                f"to {num_pooled}"
            )

    @property
    def by_pool(self) -> dict[str, RolloutConfig]:
        """The settings of every pool's workers; without pools there is one, whose name is empty."""
        return {name: self._pool(name) for name in self.pools} or {"": self}

    @property
    def engine_gpus(self) -> tuple[int, ...]:
        """GPUs of every engine that the run starts with, pool by pool."""
        return tuple(pool.tensor_parallel_size for pool in self.by_pool.values() for _ in range(pool.workers))

    def _pool(self, name: str) -> RolloutConfig:
        key, given = f"rollout.pools.{name}", self.pools[name]
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"{key}: a pool's name has letters, digits, `.`, `_` and `-` only")
        if not isinstance(given, dict) or "workers" not in given or not set(given) <= set(POOL_FIELDS):
            raise ValueError(
                f"{key} must be a mapping of workers and any of {', '.join(POOL_FIELDS[1:])}, not {given!r}"
            )
        for field_name, types in (
            ("workers", int),
            ("num_cpus", (int, float)),
            ("num_gpus", (int, float)),
            ("tensor_parallel_size", int),
            ("resources", dict),
            ("labels", dict),
            ("spot", bool),
        ):
            value = given.get(field_name)
            if value is not None and (not isinstance(value, types) or (isinstance(value, bool) and types is not bool)):
                raise ValueError(f"{key}.{field_name}={value!r} is of another type than rollout.{field_name}")
        try:
            return replace(self, pools={}, autoscale=AutoscaleConfig(), **given)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
