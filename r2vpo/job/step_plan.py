"""What it takes to compute a learner step of a run again: from which weights, through which steps, with which settings.

    history.jsonl ──▶ settings of every step ┐
    checkpoints/  ──▶ newest at or before S  ├─▶ StepPlan ──▶ recompute
    metrics.jsonl ──▶ what was recorded      ┘

Nothing heavy is imported: what makes a recomputation impossible is said at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from learner.checkpoint import DamagedCheckpoint, complete, read_state
from r2vpo.job.config import RayConfig, RunConfig, load_config
from r2vpo.job.history import Start, environment, read_starts, start_of_step
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError, leaves
from r2vpo.job.tracking import read_metrics

_SECTIONS = ("algorithm.", "learner.", "replay.")
_KEYS = ("seed", "model.path", "rollout.temperature", "rollout.dtype")
_WITHOUT_EFFECT = frozenset(
    f"learner.{name}"
    for name in (
        "steps",
        "bucket_mb",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "max_bad_steps",
        "num_cpus",
        "num_gpus",
        "step_timeout_s",
    )
)
"""Settings of the learner that do not change what a step computes."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive steps that were trained with the same settings."""

    config: RunConfig
    steps: range


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """How a learner step is computed again."""

    step: int
    checkpoint: Path | None
    """Where to begin; None is the model before the first step."""
    segments: tuple[Segment, ...]
    recorded: Mapping[int, Mapping[str, Any]]
    """Line of metrics.jsonl of every step on the way."""
    notes: tuple[str, ...]
    """Sentences on what is not as it was when the step was trained."""

    @property
    def steps(self) -> range:
        """All steps that are computed; the last one is ``step``."""
        return range(self.segments[0].steps.start, self.step + 1)

    @property
    def origin(self) -> str:
        """Where it begins, in words."""
        return f"checkpoint {self.checkpoint.name}" if self.checkpoint else "the model itself"

    def on(self, ray: RayConfig) -> StepPlan:
        """The same plan, computed elsewhere than the run was."""
        return replace(self, segments=tuple(replace(s, config=replace(s.config, ray=ray)) for s in self.segments))


def make_plan(run: RunDir, *, step: int, checkpoint: Path | None = None) -> StepPlan:
    """The way to ``step`` from ``checkpoint``, or from the run's newest at or before it, or else from its model.

    ``ConfigError`` if the step was not recorded, if the checkpoint is none or is later, or if it does not fit the
    settings.
    """
    recorded = {metrics["step"]: metrics for metrics in read_metrics(run.metrics)}
    if step not in recorded:
        held = f"holds steps {min(recorded)} to {max(recorded)}" if recorded else "is empty"
        raise ConfigError(f"--step {step}: {run.path} has not recorded this step, its {run.metrics.name} {held}")
    first, path = _origin(run, step, checkpoint)
    missing = [s for s in range(first, step) if s not in recorded]
    if missing:
        raise ConfigError(f"{run.metrics}: step {missing[0]} is missing, through which the way to step {step} leads")
    starts = read_starts(run)
    segments = tuple(_segments(run, starts, range(first, step + 1)))
    if path is not None:
        _check_fit(path, segments[0].config)
    else:
        _check_model(segments[0].config)
    return StepPlan(
        step=step,
        checkpoint=path,
        segments=segments,
        recorded={s: recorded[s] for s in range(first, step + 1)},
        notes=tuple(_notes(run, starts, step)),
    )


def _origin(run: RunDir, step: int, given: Path | None) -> tuple[int, Path | None]:
    """The first step to compute, and the checkpoint that precedes it."""
    if given is None:
        earlier = {s: path for s, path in complete(run.checkpoints).items() if s <= step}
        return max(earlier.items(), default=(0, None))
    try:
        first = read_state(given)["version"]
    except ValueError as error:
        raise ConfigError(f"--checkpoint {given}: {error}") from None
    if first > step:
        raise ConfigError(
            f"--checkpoint {given} holds the weights after step {first - 1}, which is too late for --step {step}; "
            "name an earlier one, or none"
        )
    return first, given


def _segments(run: RunDir, starts: Sequence[Start], steps: range) -> list[Segment]:
    if not starts:
        return [Segment(config=load_config(run.config), steps=steps)]
    merged: list[Segment] = []
    for start, members in groupby(steps, key=lambda step: start_of_step(starts, step)):
        number = list(members)
        if start is None:
            raise ConfigError(f"{run.path}: its history begins after step {number[0]}; restore history.jsonl")
        config, first = start.config(), number[0]
        if merged and effective(merged[-1].config) == effective(config):
            config, first = merged[-1].config, merged.pop().steps.start
        merged.append(Segment(config=config, steps=range(first, number[-1] + 1)))
    return merged


def effective(config: RunConfig) -> dict[str, Any]:
    """The settings, by dotted key, that a learner step may depend on."""
    return {
        key: value
        for key, value in leaves(config)
        if (key.startswith(_SECTIONS) or key in _KEYS) and key not in _WITHOUT_EFFECT
    }


def removed_meanwhile(checkpoint: Path) -> ConfigError:
    """The run that goes on has removed a checkpoint that was about to be used."""
    return ConfigError(
        f"{checkpoint} was removed while it was read: a run keeps only its newest checkpoints; raise "
        "learner.keep_checkpoints, or use a later step"
    )


def _check_fit(checkpoint: Path, config: RunConfig) -> None:
    """Refuse a checkpoint that was written with other settings, such as after an edit of config.yaml."""
    try:
        state = read_state(checkpoint)
    except DamagedCheckpoint as error:
        raise ConfigError(str(error)) from None
    except ValueError:
        raise removed_meanwhile(checkpoint) from None
    learner = config.learner
    pairs = {
        "seed": (state["seed"], config.seed),
        "learner.ranks": (state["ranks"], learner.ranks),
        "learner.zero_stage": (state["zero_stage"], learner.zero_stage),
        "learner.dtype": (state["dtype"], state["dtype"] if learner.dtype == "auto" else learner.dtype),
    }
    for key, (saved, given) in pairs.items():
        if saved != given:
            raise ConfigError(
                f"{key}={given} in the run's settings, but {checkpoint} was written with {key}={saved}: the settings "
                "have changed since; put the old value back into config.yaml, or name another --checkpoint"
            )


def _check_model(config: RunConfig) -> None:
    path = Path(config.model.path)
    if path.is_absolute() and not path.is_dir():
        raise ConfigError(
            f"model.path={path} is gone, from which the first step begins; put the model back, or choose a step after "
            "a checkpoint"
        )


def _notes(run: RunDir, starts: Sequence[Start], step: int) -> Iterator[str]:
    if not starts:
        yield f"{run.path} has no history.jsonl: config.yaml is taken for the settings of every step"
        return
    if run.config.read_text(encoding="utf-8") != starts[-1].settings:
        yield from _edits(run, starts[-1].config())
    start = start_of_step(starts, step)
    assert start is not None, "the segments have found it"
    here = environment()
    for name in dict.fromkeys([*start.environment, *here]):
        before, after = start.environment.get(name, "not there"), here.get(name, "not there")
        if before != after:
            yield f"{name} differs: {before} when step {step} was trained, {after} now"


def _edits(run: RunDir, then: RunConfig) -> Iterator[str]:
    """What config.yaml says now, other than the run's newest start."""
    try:
        now = effective(load_config(run.config))
    except ConfigError as error:
        yield f"config.yaml cannot be read ({error}); the settings in history.jsonl are used"
        return
    for key, value in effective(then).items():
        if now[key] != value:
            yield (
                f"config.yaml was changed since the run was started: {key}={now[key]}, was {value}, which is used here"
            )
