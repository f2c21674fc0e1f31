"""The studies of the comparison: which runs each needs. A run that two studies share is made once.

| study | question |
|---|---|
| on-policy, replay | rollouts to a target, accuracy at equal rollouts: each method at its best learning rate |
| lag | accuracy when all samples are that many versions old |
| rates | accuracy over a 20-fold range of nominal learning rates, untuned |
| sparse | a task that begins with one right answer in thirty |
| flips | accuracy with 10 % of the rewards turned over |
| reuse | the main comparison with more reuse |
| parts, deltas | each part of R²VPO alone or changed; the budget over two orders of magnitude |
| sizes | the same settings on a larger model |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.evidence.methods import ABLATIONS, GRPO, MAIN, OTHERS, OURS, R2VPO, Method
from benchmarks.evidence.setting import Setting

TUNED_ON, CHECKED_ON, SPARSE = "addition4", "sorting10", "addition8"
TASKS = (TUNED_ON, CHECKED_ON)
"""Of the main comparison: settings were chosen on the first; docs/evidence.md says what was looked at on the second."""
LRS = (1e-4, 3e-4, 1e-3)
MIDDLE_LR = LRS[1]
RANGE = (5e-5, 1.5e-4, 5e-4, 1e-3)
LAGS = (0, 1, 4, 16, 64, 256)
DELTAS = (0.002, 0.01, 0.02, 0.04, 0.08, 0.2)
REUSE = 8
"""Learner steps that train on a group on average."""
MAX_AGE = 16
"""Largest age of a stale group (learner steps): what suits R²VPO and GRPO alike."""
REUSES = (16,)
"""More reuse than in the main comparison."""
BEYOND = ("decoupled clip", "GSPO")
"""The strongest of the other rivals with replay: compared at more reuse too."""


BestLr = Callable[[Setting, str], float]
"""The best learning rate for a common setting and a method's name."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much is run."""

    lrs: Sequence[float] = LRS
    """The grid that each method chooses its learning rate from; one alone leaves nothing to choose."""
    tuning_seeds: Sequence[int] = (0,)
    seeds: Sequence[int] = (10, 11, 12, 13, 14)
    """Of the main comparison, and of the learning rates."""
    side_seeds: Sequence[int] = (10, 11, 12)
    """Of everything else."""
    on_policy_iterations: int = 100
    replay_iterations: int = 60
    lag_iterations: int = 120
    lags: Sequence[int] = LAGS
    reuses: Sequence[int] = REUSES
    others: Mapping[str, Method] = field(default_factory=lambda: OTHERS)
    ablations: Mapping[str, Method] = field(default_factory=lambda: ABLATIONS)
    deltas: Sequence[float] = DELTAS
    sizes: Sequence[str] = ("0.4M",)
    sparse: Sequence[str] = (SPARSE,)


FULL = Scale()
QUICK = Scale(
    lrs=(MIDDLE_LR,),
    tuning_seeds=(),
    seeds=(10,),
    side_seeds=(10,),
    on_policy_iterations=30,
    replay_iterations=15,
    lag_iterations=30,
    lags=(0, 64),
    reuses=(),
    others={},
    ablations={},
    deltas=(),
    sizes=(),
    sparse=(),
)
"""Every row of the result, on so few and short runs that the figures say little."""


def on_policy(scale: Scale, task: str) -> Setting:
    """The common settings of runs without replay."""
    return Setting(task=task, iterations=scale.on_policy_iterations)


def with_replay(scale: Scale, task: str, *, reuse: int = REUSE) -> Setting:
    """The common settings of runs with replay: the same reuse for every method."""
    return Setting(task=task, iterations=scale.replay_iterations, reuse=reuse, max_age=MAX_AGE)


def grid(scale: Scale, base: Setting, method: Method) -> list[Setting]:
    """A method at every learning rate of the grid, on the tuning seeds."""
    return [setting for lr in scale.lrs for setting in at(base, method, scale.tuning_seeds, lr=lr)]


def at(base: Setting, method: Method, seeds: Sequence[int], *, lr: float = MIDDLE_LR) -> list[Setting]:
    """A method at one learning rate."""
    return [replace(base, algorithm=method, lr=lr, seed=seed) for seed in seeds]


def tuning_runs(scale: Scale) -> Iterator[Setting]:
    """What the learning rates of the main comparison are chosen on."""
    for task in TASKS:
        for base in (on_policy(scale, task), with_replay(scale, task)):
            for method in MAIN.values():
                yield from grid(scale, base, method)


def main_runs(scale: Scale, best_lr: BestLr) -> Iterator[Setting]:
    """The main comparison, on fresh seeds."""
    for task in TASKS:
        for base in (on_policy(scale, task), with_replay(scale, task)):
            for name, method in MAIN.items():
                yield from at(base, method, scale.seeds, lr=best_lr(base, name))


def other_tuning_runs(scale: Scale) -> Iterator[Setting]:
    """What the learning rates of the other rivals are chosen on."""
    for method in scale.others.values():
        yield from grid(scale, with_replay(scale, TUNED_ON), method)
    if scale.reuses:
        for name in BEYOND:
            yield from grid(scale, with_replay(scale, CHECKED_ON), OTHERS[name])


def other_runs(scale: Scale, best_lr: BestLr) -> Iterator[Setting]:
    """The other rivals on fresh seeds, with replay."""
    base = with_replay(scale, TUNED_ON)
    for name, method in scale.others.items():
        yield from at(base, method, scale.side_seeds, lr=best_lr(base, name))


def reuse_methods() -> Mapping[str, Method]:
    """The methods of the reuse study."""
    return {**MAIN, **{name: OTHERS[name] for name in BEYOND}}


def reuse_runs(scale: Scale, best_lr: BestLr) -> Iterator[Setting]:
    """More reuse than in the main comparison, at the learning rates that were chosen there."""
    for task in TASKS:
        for reuse in scale.reuses:
            again = with_replay(scale, task, reuse=reuse)
            for name, method in reuse_methods().items():
                yield from at(again, method, scale.seeds, lr=best_lr(with_replay(scale, task), name))


def side_runs(scale: Scale) -> Iterator[Setting]:
    """Everything that needs no tuning."""
    replay = with_replay(scale, TUNED_ON)
    for lr in RANGE:
        for method in (R2VPO, GRPO):
            yield from at(replay, method, scale.seeds, lr=lr)
    for method in lag_methods().values():
        for lag in scale.lags:
            yield from at(lag_base(scale, lag), method, scale.side_seeds)
    for method in MAIN.values():
        yield from at(replace(replay, flip=0.1), method, scale.side_seeds)
        for task in scale.sparse:
            yield from at(with_replay(scale, task), method, scale.side_seeds)
    for method in scale.ablations.values():
        yield from at(replay, method, scale.side_seeds)
    for delta in scale.deltas:
        yield from at(replay, {**R2VPO, "delta": delta}, scale.side_seeds)
    for size in scale.sizes:
        for method in MAIN.values():
            yield from at(replace(replay, size=size), method, scale.side_seeds)


def lag_base(scale: Scale, lag: int) -> Setting:
    """No replay; every sample comes from weights that are ``lag`` versions old."""
    return Setting(task=TUNED_ON, iterations=scale.lag_iterations, lag=lag)


def lag_methods() -> Mapping[str, Method]:
    """The methods of the lag study."""
    return {OURS: R2VPO, "GRPO": GRPO, "decoupled clip": OTHERS["decoupled clip"]}
