"""How many rollout workers the learner needs, by who waits for whom.

    learner waits for groups      → one worker more    (rollout.autoscale.max at most)
    workers wait for the learner  → one worker less    (rollout.autoscale.min at least)

Both shares are means over a window of learner steps, and after a change a whole new window is measured: an engine takes
its time to start, and a fleet that follows every step would start and end engines all day.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rollout.config import AutoscaleConfig

WINDOW_STEPS = 20
"""Learner steps over which is measured."""
LEARNER_WAITS = 0.2
"""Share of its time that the learner waits for groups, above which a worker is added."""
WORKERS_WAIT = 0.5
"""Share of their time that workers have nothing to do, above which one may go, if the learner hardly waits."""
HARDLY = 0.05


class Change(NamedTuple):
    """What the fleet should be, and why."""

    workers: int
    reason: str


class Autoscaler:
    """Looks at the metrics of every learner step."""

    def __init__(self, config: AutoscaleConfig) -> None:
        self._config = config
        self._steps: list[tuple[float, float, float]] = []

    def look(self, metrics: Mapping[str, Any], *, target: int, serving: int) -> Change | None:
        """What to do after a step, if anything. ``target`` workers are wanted, and ``serving`` of them are there."""
        if not self._config.is_on:
            return None
        if serving < target:  # what is measured now says nothing about the fleet that is coming
            self._steps.clear()
            return None
        step_s = metrics["time/step_s"]
        self._steps.append((step_s, metrics["time/wait_s"], metrics["rollout/idle_fraction"] * step_s))
        if len(self._steps) < WINDOW_STEPS:
            return None
        total_s, wait_s, idle_s = (sum(column) for column in zip(*self._steps, strict=True))
        self._steps.clear()
        waits, idles = (wait_s / total_s, idle_s / total_s) if total_s > 0 else (0.0, 0.0)
        window = (
            f"over {WINDOW_STEPS} steps the learner waited {waits:.0%} of its time, the workers {idles:.0%} of theirs"
        )
        if waits > LEARNER_WAITS and target < self._config.max:
            return Change(target + 1, f"{window}: one worker more, {target + 1} of at most {self._config.max}")
        if waits < HARDLY and idles > WORKERS_WAIT and target > self._config.min:
            return Change(target - 1, f"{window}: one worker less, {target - 1} of at least {self._config.min}")
        return None
