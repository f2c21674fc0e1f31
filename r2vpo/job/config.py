"""The settings of a run: every room's section, what the job itself needs, and the checks across sections.

Importing this file imports none of Ray, torch, vLLM or DeepSpeed: a bad setting is refused at once.

See docs/settings.md.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from learner.config import LearnerConfig
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.checks import require
from r2vpo.job.ray_address import token_environment
from r2vpo.job.settings import ConfigError, dump, load
from replay.config import ReplayConfig
from rollout.config import RolloutConfig, TaskConfig

__all__ = [
    "ConfigError",
    "ModelConfig",
    "RayConfig",
    "RunConfig",
    "SupervisorConfig",
    "TrackingConfig",
    "load_config",
    "to_yaml",
]


NO_GPU_TO_BROADCAST = (
    "learner.weight_transport=nccl broadcasts from GPU to GPU, and this cluster has none; set it to object_store"
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained."""

    path: str
    """Directory with config.json, *.safetensors and the tokenizer, or the id of a model on the Hugging Face hub."""
    trust_remote_code: bool = False
    """Let engine and tokenizer run Python code that comes with the model; the learner never does."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("model.path is empty; name a model directory or the id of a model on the Hugging Face hub")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: str = "auto"
    """`online`, `offline`, `off`, or `auto`: online where a W&B key is configured, else offline."""
    project: str = "r2vpo"
    """Project in W&B."""

    def __post_init__(self) -> None:
        require.one_of("tracking.wandb", self.wandb, ("auto", "online", "offline", "off"))
        if not self.project.strip():
            raise ValueError("tracking.project is empty; name a W&B project, such as r2vpo")


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """The Ray cluster that the job runs on."""

    address: str | None = None
    """Join this cluster (`auto`, or an address); null starts a private local one that ends with the job."""
    num_cpus: float | None = None
    """CPUs of the private local Ray; null takes those of the machine, or what the run reserves if that is more."""
    object_store_mb: int | None = None
    """Object store (MiB) of the private local Ray; null is 512."""

    def __post_init__(self) -> None:
        if self.address is not None and not self.address.strip():
            raise ValueError("ray.address is empty; name a cluster, or set it to null for a private Ray")
        for key, value in (("num_cpus", self.num_cpus), ("object_store_mb", self.object_store_mb)):
            if value is None:
                continue
            if self.address is not None:
                raise ValueError(
                    f"ray.{key}={value} sizes a private local Ray, but ray.address={self.address} joins a cluster; "
                    "remove one of the two"
                )
            require.positive(f"ray.{key}", value)
        if self.object_store_mb is not None:
            require.at_least("ray.object_store_mb", self.object_store_mb, 80)

    def environment(self) -> dict[str, str]:
        """Variables that must be set before Ray is imported."""
        common = {
            "RAY_USAGE_STATS_ENABLED": "0",
            # Ray pushes notices about dead processes to the screen, whatever it is told about logs; the run's own
            # sentence says it, and logs/error.log has the rest.
            "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
        } | token_environment(self.address)
        if self.address is not None:
            return common
        # Ray's switch for machines that cannot form clusters: every server of a private Ray then listens on 127.0.0.1
        # instead of on all interfaces, which its own address setting does not achieve.
        return common | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@dataclass(frozen=True, kw_only=True)
class SupervisorConfig:
    """When a part of the run counts as dead, and how often it is started again."""

    max_restarts: int = 3
    """Restarts of one component within `window_s`; one failure more ends the run."""
    window_s: float = 600.0
    """Seconds after which a restart is forgotten."""
    backoff_s: float = 1.0
    """Seconds before a component's first restart; each further one within `window_s` waits twice as long."""
    silent_s: float = 120.0
    """Seconds without an answer after which a process, or without a token after which an engine, counts as dead."""
    probe_every_s: float = 30.0
    """Seconds between two proofs that an engine works: one token that it must generate."""

    def __post_init__(self) -> None:
        require.at_least("supervisor.max_restarts", self.max_restarts, 0)
        require.positive("supervisor.window_s", self.window_s)
        require.at_least("supervisor.backoff_s", self.backoff_s, 0.0)
        require.positive("supervisor.silent_s", self.silent_s)
        require.positive("supervisor.probe_every_s", self.probe_every_s)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about one run."""

    name: str = "run"
    """Name of the run and of its folder in `run_dir`."""
    seed: int = 0
    """Seed of the order of prompts, of sampling and of batches."""
    run_dir: str = "runs"
    """Folder that holds the runs."""
    model: ModelConfig
    """The model that is trained."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """Where prompts and verdicts come from."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """What the learner optimises."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The rollout workers."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """The replay store."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """The learner group."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where metrics go."""
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    """What becomes of parts that die."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", self.name):
            raise ValueError(
                f"name={self.name} cannot name a folder; use letters, digits, `.`, `_` and `-`, at most 128, "
                "beginning with a letter or a digit"
            )
        if not self.run_dir.strip():
            raise ValueError("run_dir is empty; name a folder for the runs, such as runs")
        require.between("seed", self.seed, 0, 2**31 - 1)
        self.replay.check_against(
            groups_per_step=self.learner.groups_per_step,
            minibatches=self.learner.minibatches,
            steps=self.learner.steps,
            checkpoint_every=self.learner.checkpoint_every,
            keep_checkpoints=self.learner.keep_checkpoints,
        )
        if self.replay.min_verdicts > self.rollout.group_size:
            raise ValueError(
                f"replay.min_verdicts={self.replay.min_verdicts} exceeds rollout.group_size={self.rollout.group_size}: "
                "no group could ever be trained on, and the learner would wait forever; lower min_verdicts to "
                f"{self.rollout.group_size} or less, or raise group_size"
            )
        if self.learner.sync_every > self.replay.max_lag + 1:
            raise ValueError(
                f"learner.sync_every={self.learner.sync_every} exceeds replay.max_lag={self.replay.max_lag} + 1: "
                "before the next weights are published, what the newest ones sample would be too old to be trained as "
                "fresh, and learner and workers would wait for each other; lower sync_every, or raise max_lag to "
                f"{self.learner.sync_every - 1}"
            )
        if self.task.eval_every % self.learner.sync_every:
            raise ValueError(
                f"task.eval_every={self.task.eval_every} is no multiple of learner.sync_every="
                f"{self.learner.sync_every}: only published weights can be evaluated; change one of the two"
            )
        if self.fixed_fleet:
            self._check_broadcast()
        pools = self.rollout.by_pool.values()
        custom = {name: 0.0 for section in (*pools, self.learner) for name in section.resources}
        labels = {name: "" for pool in pools for name in pool.labels}
        if labels and self.ray.address is None:
            raise ValueError(
                f"rollout.labels ask Ray for nodes with {', '.join(labels)}, and a private Ray has one node without "
                "labels; remove them, or join the cluster that has them with ray.address"
            )
        if custom and self.ray.address is None:
            raise ValueError(
                f"rollout.resources and learner.resources ask Ray for {', '.join(custom)}, and a private Ray has only "
                "CPUs and GPUs; remove them, or join the cluster that has them with ray.address"
            )
        if self.num_fresh < self.learner.minibatches:
            raise ValueError(
                f"learner.minibatches={self.learner.minibatches} exceeds the {self.num_fresh} fresh groups that "
                f"learner.groups_per_step={self.learner.groups_per_step} and replay.stale_fraction="
                f"{self.replay.stale_fraction} leave: the first step has no stale group, and a minibatch needs one "
                "at least; lower minibatches or stale_fraction, or raise groups_per_step"
            )
        if self.algorithm.name == "m2po":
            raise ValueError(
                "algorithm.name=m2po masks tokens by a statistic of a whole minibatch, which the learner sees only in "
                "parts (learner.micro_batch_tokens, learner.ranks); choose another objective, such as r2vpo or "
                "truncated_is"
            )
        if self.algorithm.step_control and self.learner.minibatches < 2:
            raise ValueError(
                "algorithm.step_control=true has nothing to measure with learner.minibatches="
                f"{self.learner.minibatches}: V is 0 at the only optimiser step of a learner step; set it to 2 "
                "or more, or step_control=null"
            )
        if self.ray.num_cpus is not None and self.ray.num_cpus < self.reserved_cpus:
            raise ValueError(
                f"ray.num_cpus={self.ray.num_cpus:g} is less than the {self.reserved_cpus:g} CPUs that rollout.workers="
                f"{self.rollout.workers} (rollout.num_cpus={self.rollout.num_cpus:g} each) and learner.ranks="
                f"{self.learner.ranks} (learner.num_cpus={self.learner.num_cpus:g} each) reserve: some would never be "
                "placed; raise ray.num_cpus, or set it to null"
            )

    def _check_broadcast(self) -> None:
        pools = self.rollout.by_pool
        sections = [(f"rollout.pools.{name}" if name else "rollout", pool.num_gpus) for name, pool in pools.items()]
        for section, each in (*sections, ("learner", self.learner.num_gpus)):
            if each is not None and each < 1:
                raise ValueError(
                    "learner.weight_transport=nccl broadcasts from GPU to GPU, and every worker and rank needs one of "
                    f"its own, not {section}.num_gpus={each:g}: set it to 1 or null, or weight_transport=object_store"
                )
        if self.rollout.autoscale.is_on:
            raise ValueError(
                f"rollout.autoscale.max={self.rollout.autoscale.max} adds and drains workers, but {self.fixed_fleet}"
            )

    @property
    def fixed_fleet(self) -> str:
        """Why no worker may come, go or be replaced while the run lasts, and what to do; "" if they may."""
        if self.learner.weight_transport != "nccl":
            return ""
        return (
            "learner.weight_transport=nccl ties the weights to the processes that the run started with: go on with "
            "`r2vpo resume` (and another rollout.workers, if you like), or set it to object_store"
        )

    @property
    def reserved_cpus(self) -> float:
        """CPUs that rollout workers and learner ranks reserve in Ray."""
        workers = sum(pool.workers * pool.num_cpus for pool in self.rollout.by_pool.values())
        return workers + self.learner.ranks * self.learner.num_cpus

    @property
    def num_fresh(self) -> int:
        """Fresh groups of every batch."""
        return self.replay.num_fresh(self.learner.groups_per_step)

    @property
    def num_stale(self) -> int:
        """Stale groups of a full batch."""
        return self.replay.num_stale(self.learner.groups_per_step)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about settings that work, but not as one might expect."""
        notes: list[str] = []
        if self.learner.lr == 0:
            notes.append("learner.lr=0: a control run, in which neither weights nor budget move")
        if self.algorithm.has_multiplier and self.learner.minibatches == 1:
            notes.append(
                "learner.minibatches=1: V is always 0, so neither λ nor step control acts: plain policy gradient"
            )
        if self.replay.sample in ("mixed", "priority") and self.replay.stale_fraction > 0 and self.num_stale == 0:
            notes.append(
                f"replay.stale_fraction={self.replay.stale_fraction} of learner.groups_per_step="
                f"{self.learner.groups_per_step} rounds to no stale group: nothing is replayed"
            )
        slots = self.rollout.workers * self.rollout.groups_in_flight
        outstanding = self.num_fresh * (self.replay.max_lag + 1)
        if slots > outstanding:
            notes.append(
                f"rollout.workers × rollout.groups_in_flight = {slots} groups, but {self.num_fresh} fresh groups per "
                f"step and replay.max_lag={self.replay.max_lag} let at most {outstanding} be under way: the rest idles"
            )
        return tuple(notes)


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file and ``key=value`` overrides describe, with local paths made absolute.

    A relative path is looked up from the current directory and then from the folder above the config file's, so that
    ``configs/x.yaml`` finds what lies in the repository. Raises ``ConfigError`` with one message for the user.
    """
    config = load(RunConfig, path, overrides)
    homes = (Path.cwd(), path.resolve().parent.parent)
    task = config.task
    return replace(
        config,
        run_dir=str(Path(_located("run_dir", config.run_dir, homes[:1])).expanduser().absolute()),
        model=replace(config.model, path=_located("model.path", config.model.path, homes)),
        task=replace(
            task,
            path=task.path and _located("task.path", task.path, homes),
            eval_path=task.eval_path and _located("task.eval_path", task.eval_path, homes),
            eval_sets={
                name: _located_set(f"task.eval_sets.{name}", given, homes) for name, given in task.eval_sets.items()
            },
        ),
    )


def to_yaml(config: RunConfig) -> str:
    """The resolved settings as YAML; ``load_config`` reads it back to an equal ``RunConfig``."""
    return dump(config)


def _located_set(key: str, given: Any, homes: Sequence[Path]) -> Any:
    """An entry of ``task.eval_sets`` with its path located."""
    if isinstance(given, str):
        return _located(key, given, homes)
    return given | {"path": _located(f"{key}.path", given["path"], homes)}


def _located(key: str, text: str, homes: Sequence[Path]) -> str:
    """The absolute path of what exists under one of ``homes``; otherwise the text unchanged (a hub id, or missing)."""
    try:
        given = Path(text).expanduser()
        found = next((home / given for home in homes if (home / given).exists()), None)
    except (OSError, RuntimeError) as error:  # a name that is too long, a home directory that nobody has
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{key}={text[:80]}{'…' * (len(text) > 80)} cannot be a path: {reason}") from None
    return str(found.resolve()) if found else text
