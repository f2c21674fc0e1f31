"""What the runs say: the figures against their targets, and the tables and plots of the documentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence import plots, system
from benchmarks.evidence.methods import CLIPS, GRPO, MAIN, OTHERS, OURS, R2VPO, Method
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.statistics import GAIN, LAST, Interval, bootstrap, bootstrap_ratio, to_target
from benchmarks.evidence.studies import (
    MIDDLE_LR,
    RANGE,
    REUSE,
    TASKS,
    TUNED_ON,
    Scale,
    lag_base,
    lag_methods,
    on_policy,
    reuse_methods,
    with_replay,
)
from benchmarks.table import Row, at_least, at_most, reported

Run = Mapping[str, Any]
METHODS = {**MAIN, **OTHERS}
WARM = 10
"""Learner steps after which the step size has come home."""


class Results:
    """Finished runs by what they were made for."""

    def __init__(self, scale: Scale, runs: Sequence[Run]) -> None:
        self.scale = scale
        self._by_id = {run["id"]: run for run in runs}

    def of(self, base: Setting, method: Method, seeds: Sequence[int], *, lr: float | None = None) -> list[Run]:
        """The runs that are there, by seed; a run whose gradient was not finite counts as accuracy 0."""
        wanted = [replace(base, algorithm=method, seed=seed, lr=base.lr if lr is None else lr) for seed in seeds]
        return [_failed_as_zero(self._by_id[s.id], s) for s in wanted if s.id in self._by_id]

    def best_lr(self, base: Setting, name: str) -> float:
        """The learning rate of the grid with the best mean accuracy over the tuning runs, or the middle one.

        It is tuned on-policy and at one amount of reuse, and kept for the others.
        """
        scores = {lr: self._tuning_score(base, METHODS[name], lr) for lr in self.scale.lrs}
        return max(scores, key=lambda lr: (scores[lr], lr == MIDDLE_LR, -lr))

    def main(self, base: Setting, name: str) -> list[Run]:
        """Runs of a method at its best learning rate, on the fresh seeds."""
        return self.of(base, METHODS[name], self.scale.seeds, lr=self.best_lr(base, name))

    def best_clip(self, base: Setting) -> str:
        """The clip with the highest score in the tuning runs."""
        return max(CLIPS, key=lambda name: self._tuning_score(base, METHODS[name], self.best_lr(base, name)))

    def target(self, task: str) -> float:
        """The accuracy that the rollouts to a target are counted to."""
        base = on_policy(self.scale, task)
        runs = self.main(base, self.best_clip(base))
        if not runs:
            return nan
        start = np.mean([run["evaluations"][0][1] for run in runs])
        return float(start + GAIN * (np.mean([_last(run) for run in runs]) - start))

    def _tuning_score(self, base: Setting, method: Method, lr: float) -> float:
        base = with_replay(self.scale, base.task) if base.reuse > 1 else base
        runs = self.of(base, method, self.scale.tuning_seeds, lr=lr)
        return float(np.mean([np.mean(run["curve"]["train_reward"]) for run in runs])) if runs else -1.0


def figures(found: Results) -> Iterator[Row]:
    """The rows of the result file, except the cost."""
    for task in TASKS:
        base, best = on_policy(found.scale, task), found.best_clip(on_policy(found.scale, task))
        for reuse in (REUSE, *found.scale.reuses):
            yield from _replay_rows(found, task, reuse)
        yield from _ratio(f"{task}: accuracy at equal rollouts, on-policy, ÷ {best}", found.main(base, OURS),
                          found.main(base, best), accuracy, at_least, 0.98)  # fmt: skip
    yield from _lag_rows(found)
    yield from _rate_rows(found)
    yield at_least("share of learner steps with mean V ≤ 2δ, R²VPO, main runs", _share_within(found), "share", 0.95)


def _replay_rows(found: Results, task: str, reuse: int) -> Iterator[Row]:
    """R²VPO with replay against the best clip on-policy, and against the best clip with the same replay."""
    base, replay = on_policy(found.scale, task), with_replay(found.scale, task, reuse=reuse)
    target, best, best_replay = found.target(task), found.best_clip(base), found.best_clip(replay)
    ours, needed = found.main(replay, OURS), partial(to_target, target=target)
    rival, title = found.main(replay, best_replay), f"{task}, × {reuse}"
    yield from _ratio(f"{title}: rollouts to {target:.2f}, R²VPO + replay ÷ {best} on-policy", ours,
                      found.main(base, best), needed, at_most, 0.35)  # fmt: skip
    yield from _ratio(f"{title}: the same ÷ {best_replay} with the same replay", ours, rival, needed, at_most, 0.75)
    yield from _ratio(f"{title}: accuracy at equal rollouts ÷ {best_replay} with the same replay", ours, rival,
                      accuracy, at_least, 1.10)  # fmt: skip


def accuracy(run: Run) -> float:
    """Sampled accuracy of the last weights on held-out prompts."""
    return run["final"]["accuracy"]


def tables(found: Results, folder: Path) -> None:
    """Write ``tables.md`` and the plots to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    sections = [f"## {title}\n\n{text}\n" for title, text in _sections(found) if text]
    (folder / "tables.md").write_text(
        "# Evidence: tables\n\nWritten by `make bench NAME=evidence`; see [evidence.md](../evidence.md) for what they "
        "mean.\nInterquartile mean over seeds with its 95 % bootstrap interval.\n\n" + "\n".join(sections)
    )
    plots.draw_all(found, folder)


def _sections(found: Results) -> Iterator[tuple[str, str]]:
    scale = found.scale
    for task in TASKS:
        for what, base in (("on-policy", on_policy(scale, task)), ("replay", with_replay(scale, task))):
            names = [name for name in METHODS if found.main(base, name)]
            rows = [_line(f"{name} (lr {found.best_lr(base, name):g})", found.main(base, name), found.target(task))
                    for name in names]  # fmt: skip
            yield f"{task}, {what}, {base.iterations} × 256 rollouts", _table(rows)
    side = scale.side_seeds
    yield "Lag", _table(
        [_line(f"{name}, lag {lag}", found.of(lag_base(scale, lag), method, side), nan)
         for name, method in lag_methods().items() for lag in scale.lags]
    )  # fmt: skip
    replay, target = with_replay(scale, TUNED_ON), found.target(TUNED_ON)
    yield "Nominal learning rate", _table(
        [_line(f"{name}, lr {lr:g}", found.of(replay, method, scale.seeds, lr=lr), target)
         for name, method in ((OURS, R2VPO), ("GRPO", GRPO)) for lr in RANGE]
    )  # fmt: skip
    for task in scale.sparse:
        sparse = with_replay(scale, task)
        lines = [_line(name, found.of(sparse, method, side), nan) for name, method in MAIN.items()]
        yield f"{task}, replay, {sparse.iterations} × 256 rollouts, lr {sparse.lr:g}", _table(lines)
    flipped = replace(replay, flip=0.1)
    yield (
        "10 % of the rewards turned over",
        _table([_line(name, found.of(flipped, method, side), target) for name, method in MAIN.items()]),
    )
    for task in TASKS:
        for reuse in scale.reuses:
            base = with_replay(scale, task, reuse=reuse)
            lines = [_line(name, found.main(base, name), found.target(task)) for name in reuse_methods()]
            yield f"{task}, replay × {reuse}, {base.iterations} × 256 rollouts", _table(lines)
    yield (
        "Parts of R²VPO",
        _table([_line(name, found.of(replay, method, side), target) for name, method in scale.ablations.items()]),
    )
    yield (
        "Budget",
        _table([_line(f"δ = {d:g}", found.of(replay, {**R2VPO, "delta": d}, side), target) for d in scale.deltas]),
    )
    yield "Model size", _table(
        [_line(f"{name}, {size}", found.of(replace(replay, size=size), method, side), nan)
         for size in scale.sizes for name, method in MAIN.items()]
    )  # fmt: skip
    for title, head, lines in system.tables(system.kept()):
        yield title, _table(lines, head)


def _line(name: str, runs: Sequence[Run], target: float) -> list[str]:
    if not runs:
        return []
    reached = [to_target(run, target) for run in runs]
    missed = sum(run["curve"]["rollouts"][-1] + 1 == r for run, r in zip(runs, reached, strict=True))
    rollouts = "–" if not isfinite(target) else f"{bootstrap(reached)}" + (f", {missed} never" if missed else "")
    last = [np.mean(run["curve"]["entropy"][-LAST:]) for run in runs]
    second_moments = [np.mean(run["curve"]["second_moment"][WARM:]) for run in runs]
    return [
        name,
        str(len(runs)),
        rollouts,
        str(bootstrap([accuracy(run) for run in runs])),
        f"{np.mean([run['final']['pass_at_8'] for run in runs]):.3f}",
        f"{np.mean(last):.3f}",
        f"{np.mean(second_moments):.2g}",
        f"{max(max(run['curve']['second_moment_max']) for run in runs):.2g}",
        f"{np.mean([run['curve']['optimizer_steps'][-1] for run in runs]):.0f}",
    ]


HEAD = ("", "runs", "rollouts to target", "accuracy", "pass@8", "entropy", "mean V", "largest V", "optimiser steps")


def _table(lines: Sequence[Sequence[str]], head: Sequence[str] = HEAD) -> str:
    kept = [line for line in lines if line]
    if not kept:
        return ""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *kept])


def _ratio(
    name: str,
    ours: Sequence[Run],
    theirs: Sequence[Run],
    figure: Callable[[Run], float],
    judge: Callable[[str, float, str, float], Row],
    bound: float,
) -> Iterator[Row]:
    """Interquartile means, ours over theirs, and the ends of the interval as rows of their own."""
    count = min(len(ours), len(theirs))
    ratio = bootstrap_ratio([figure(r) for r in ours[:count]], [figure(r) for r in theirs[:count]])
    yield judge(name, ratio.value, "ratio", bound)
    yield from _interval_rows(name, ratio)


def _interval_rows(name: str, interval: Interval) -> Iterator[Row]:
    yield reported(f"{name}: 95 % interval, low", interval.low, "ratio")
    yield reported(f"{name}: 95 % interval, high", interval.high, "ratio")


def _lag_rows(found: Results) -> Iterator[Row]:
    scale, by_name = found.scale, {}
    for name, method in lag_methods().items():
        old, new = (found.of(lag_base(scale, lag), method, scale.side_seeds) for lag in (64, 0))
        by_name[name] = bootstrap([accuracy(r) for r in old]).value
        ratio = by_name[name] / bootstrap([accuracy(r) for r in new]).value
        row = at_least if name == OURS else lambda name, value, unit, _: reported(name, value, unit)
        yield row(f"accuracy at lag 64 ÷ at lag 0, {name}", ratio, "ratio", 0.95)
    rivals = max(value for name, value in by_name.items() if name != OURS)
    yield at_least("accuracy at lag 64, R²VPO ÷ best rival", by_name[OURS] / rivals, "ratio", 1.0)


def _rate_rows(found: Results) -> Iterator[Row]:
    replay = with_replay(found.scale, TUNED_ON)
    for name, method in ((OURS, R2VPO), ("GRPO", GRPO)):
        by_lr = [
            bootstrap([accuracy(r) for r in found.of(replay, method, found.scale.seeds, lr=lr)]).value for lr in RANGE
        ]
        worst = min(by_lr) / max(by_lr)
        title = f"accuracy over a 20-fold range of learning rates, worst ÷ best, {name}"
        yield at_least(title, worst, "ratio", 0.97) if name == OURS else reported(title, worst, "ratio")


def _share_within(found: Results) -> float:
    """Learner steps after warm-up whose mean V is at most 2δ."""
    within: list[bool] = []
    for task in TASKS:
        for base in (on_policy(found.scale, task), with_replay(found.scale, task)):
            for run in found.main(base, OURS):
                limit = 2 * Setting.from_json(run["setting"]).algorithm_config().delta
                within += [v <= limit for v in run["curve"]["second_moment"][WARM:]]
    return float(np.mean(within)) if within else nan


def _last(run: Run) -> float:
    return float(np.mean(run["curve"]["train_reward"][-LAST:]))


def _failed_as_zero(run: Run, setting: Setting) -> Run:
    if "error" not in run:
        return run
    names = ("train_reward", "second_moment", "second_moment_max", "entropy", "lam", "step_scale", "optimizer_steps")
    zeros = dict.fromkeys(names, [0.0] * setting.iterations)
    rollouts = [256.0 * (i + 1) for i in range(setting.iterations)]
    return {
        "setting": run["setting"],
        "curve": {**zeros, "rollouts": rollouts},
        "evaluations": [[0, 0.0]],
        "final": {"accuracy": 0.0, "pass_at_8": 0.0, "greedy_accuracy": 0.0},
    }
