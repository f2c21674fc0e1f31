"""What is read off a run while it goes on and when it is over, as numbers and as text. Both views say it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from r2vpo.job.config import RunConfig

Metrics = Mapping[str, Any]
RECENT_STEPS = 20
BLOCKS = "▁▂▃▄▅▆▇█"


class Progress:
    """What both views remember of the steps so far."""

    def __init__(self, config: RunConfig, clock: Callable[[], float]) -> None:
        self.config = config
        self.clock = clock
        self.metrics: Metrics = {}
        self.step = 0
        self.total = config.learner.steps
        self.rewards: list[float] = []
        self.accuracies: list[tuple[str, float]] = []
        self.mark()

    def mark(self) -> None:
        """Something before the first step begins or ends: the clock of the steps runs from the last such moment."""
        if not self.step:
            self.started_s = self.clock()
            self._ends_s = [self.started_s]

    def evaluated(self, label: str, accuracy: float) -> None:
        """Take in an evaluation."""
        self.mark()
        self.accuracies = [*self.accuracies, (label, accuracy)]

    def add(self, metrics: Metrics, step: int, total: int) -> None:
        """Take in a finished step."""
        self._ends_s = [*self._ends_s[-RECENT_STEPS:], self.clock()]
        self.metrics, self.step, self.total = metrics, step, total
        reward = number(metrics, "train/reward_mean")
        if reward is not None:
            self.rewards = [*self.rewards, reward]
        accuracy = number(metrics, "eval/accuracy")
        if accuracy is not None:
            self.evaluated(f"step {step}", accuracy)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the training loop began."""
        return self.clock() - self.started_s

    @property
    def left_s(self) -> float | None:
        """Seconds that the remaining steps will take at the pace of the last ones; None before the first step."""
        steps = len(self._ends_s) - 1
        if steps < 1:
            return None
        return (self._ends_s[-1] - self._ends_s[0]) / steps * (self.total - self.step)

    @property
    def budget(self) -> float | None:
        """δ̂, what the last batch may spend of δ; None in a run whose V nothing bounds."""
        algorithm, share = self.config.algorithm, number(self.metrics, "control/budget_share")
        if not (algorithm.has_multiplier or algorithm.controls_step):
            return None
        return algorithm.delta * (1.0 if share is None else share)


def describe(config: RunConfig) -> str:
    """A run in one line: ``r2vpo on arithmetic, quickstart-model, 1 rollout worker, 1 learner rank``."""
    workers, ranks = config.rollout.workers, config.learner.ranks
    return (
        f"{config.algorithm.name} on {config.task.name}, {Path(config.model.path).name}, "
        f"{workers} rollout worker{'s' * (workers != 1)}, {ranks} learner rank{'s' * (ranks != 1)}"
    )


def evaluation_text(label: str, accuracy: float, greedy: float, num_prompts: int) -> str:
    """An evaluation in one line."""
    return f"accuracy {label}: {accuracy:.3f} sampled, {greedy:.3f} greedy, on {num_prompts} held-out prompts"


def step_text(seen: Progress) -> str:
    """A step in one line."""
    metrics = seen.metrics
    budget = "" if seen.budget is None else f"/{seen.budget:.2g}"
    parts = [
        f"step {seen.step:>{len(str(seen.total))}}/{seen.total}",
        f"reward {shown(number(metrics, 'train/reward_mean'), '.3f')}",
        f"V {shown(number(metrics, 'dual/second_moment'), '.4f')}{budget}",
        f"λ {shown(number(metrics, 'dual/lambda'), '.2f')}",
        f"scale {shown(number(metrics, 'control/scale'), '.2f')}",
        f"lag {shown(number(metrics, 'train/lag_mean'), '.1f')} (max {shown(number(metrics, 'train/lag_max'), '.0f')})",
        f"stale {percent(stale_share(metrics))}",
        f"{thousands(number(metrics, 'rollout/tokens_per_s'))} tokens/s",
        f"sync {milliseconds(number(metrics, 'sync/pause_s'))}",
    ]
    accuracy = number(metrics, "eval/accuracy")
    if accuracy is not None:
        parts.insert(2, f"accuracy {accuracy:.3f}")
    if seen.left_s is not None:
        parts.append(f"{clock_text(seen.left_s)} left")
    return "  ".join(parts)


def title_text(summary: Mapping[str, Any]) -> str:
    """The end of a run in one line."""
    return f"{summary['run']}: {summary['status']} after {summary['steps']} steps in {clock_text(summary['wall_s'])}"


def result_rows(summary: Mapping[str, Any], config: RunConfig) -> list[tuple[str, str]]:
    """What the run came to, as label and text."""
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    rows: list[tuple[str, str]] = []
    if before["accuracy"] is not None and after["accuracy"] is not None:
        rows.append(
            (
                "accuracy",
                f"{before['accuracy']:.3f} → {after['accuracy']:.3f} sampled at temperature "
                f"{config.rollout.temperature:g}, {before['greedy']:.3f} → {after['greedy']:.3f} greedy "
                f"({after['num_prompts']} held-out prompts)",
            )
        )
    replay, lag, sync = summary["replay"], summary["lag"], summary["sync"]
    rows.append(
        (
            "data",
            f"{summary['rollouts']['trajectories']:,} trajectories; {percent(replay['stale_fraction_trained'])} of the "
            f"trained tokens stale; lag {shown(lag['mean'], '.1f')} mean, {shown(lag['max'], '.0f')} max",
        )
    )
    rows.append(
        (
            "sync",
            f"{sync['count']} weight loads, median pause {milliseconds(sync['pause_s_p50'])}, "
            f"longest {milliseconds(sync['pause_s_max'])}; canary gap {shown(sync['canary_gap_max'], '.0e')} at most",
        )
    )
    return rows


def folder_rows(run_path: Path) -> list[tuple[str, str]]:
    """What lies where, for those parts that exist."""
    what = {
        "model/": "the trained model, Hugging Face format",
        "metrics.jsonl": "one object per step",
        "summary.json": "the result",
        "checkpoints/": "where the run can go on from",
        "replay/": "every trajectory, SQLite",
        "logs/": "engines, Ray, W&B",
    }
    return [(name, text) for name, text in what.items() if (run_path / name).exists()]


def resume_command(run_path: Path, summary: Mapping[str, Any]) -> str:
    """The command that continues the run: with twice the steps where it is finished, as it was where it is not."""
    more = f" learner.steps={2 * summary['steps']}" if summary["status"] == "finished" else ""
    return f"r2vpo train {near_path(run_path)}/config.yaml --resume{more}"


def near_path(path: Path) -> str:
    """A path relative to the current directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def number(metrics: Metrics, key: str) -> float | None:
    """A metric, or None where it is absent or not finite."""
    value = metrics.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def stale_share(metrics: Metrics) -> float | None:
    """Stale tokens among the trained tokens of a step."""
    stale, tokens = number(metrics, "train/stale_tokens"), number(metrics, "train/tokens")
    return None if stale is None or not tokens else stale / tokens


def learner_idle(metrics: Metrics) -> float | None:
    """Share of a step in which the learner waited for samples."""
    wait_s, step_s = number(metrics, "time/wait_s"), number(metrics, "time/step_s")
    return None if wait_s is None or not step_s else wait_s / step_s


def shown(value: float | None, form: str) -> str:
    """A number in a format, or a dash."""
    return "–" if value is None else format(value, form)


def percent(value: float | None) -> str:
    """``46 %``, or a dash."""
    return "–" if value is None else f"{100 * value:.0f} %"


def thousands(value: float | None) -> str:
    """``12,345``, or a dash."""
    return "–" if value is None else f"{value:,.0f}"


def milliseconds(value_s: float | None) -> str:
    """Seconds as ``21 ms``, or a dash."""
    return "–" if value_s is None else f"{1000 * value_s:.0f} ms"


def clock_text(seconds: float) -> str:
    """``1:02``, or ``1:02:03`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of ``values`` in at most ``width`` blocks, each the mean of its share: ``▁▂▄▆█``."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * index // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(max(means) - min(means), 1e-9)
    return "".join(BLOCKS[min(int((mean - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for mean in means)
