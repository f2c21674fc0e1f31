"""What the driver adds to the learner's metrics of a step: times, rates, and the state of store and workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from r2vpo.records import RolloutStats, SyncRecord


class StepMeter:
    """Turns running totals of the workers into rates per learner step."""

    def __init__(self) -> None:
        self._born_s = self._last_s = time.monotonic()
        self._totals = (0, 0, 0.0, 0.0)
        self.syncs: list[SyncRecord] = []
        """Every sync of every worker so far."""

    def start(self) -> None:
        """The learner's loop begins: the clock of the first step runs from here."""
        self._last_s = time.monotonic()

    def measure(
        self, *, step: int, wait_s: float, store: dict[str, Any], workers: Sequence[RolloutStats]
    ) -> dict[str, Any]:
        """Metrics of a step that has just ended, after the learner waited ``wait_s`` for its batch."""
        now_s = time.monotonic()
        step_s, self._last_s = now_s - self._last_s, now_s
        totals = (
            sum(w.tokens for w in workers),
            sum(w.trajectories for w in workers),
            sum(w.busy_s for w in workers),
            sum(w.alive_s for w in workers),
        )
        tokens, trajectories, busy_s, alive_s = (new - old for new, old in zip(totals, self._totals, strict=True))
        self._totals = totals
        new = self.add_syncs(workers)
        return {
            "step": step,
            "time/elapsed_s": now_s - self._born_s,
            "time/step_s": step_s,
            "time/wait_s": wait_s,
            "replay/groups": store["groups"],
            "replay/fresh_waiting": store["fresh_waiting"],
            "replay/in_flight": store["in_flight"],
            "replay/stale_eligible": store["stale_eligible"],
            "rollout/tokens_per_s": tokens / step_s,
            "rollout/trajectories_per_s": trajectories / step_s,
            "rollout/idle_fraction": 1 - busy_s / alive_s if alive_s > 0 else 0.0,
            "sync/count": len(self.syncs),
            "sync/version_min": min((w.version for w in workers), default=-1),
            "sync/pause_s": max((s.pause_s for s in new), default=None),
            "sync/canary_gap": max((s.canary_gap for s in new), default=None),
        }

    def add_syncs(self, workers: Sequence[RolloutStats]) -> list[SyncRecord]:
        """Take in what the workers report since they were last asked."""
        new = [sync for worker in workers for sync in worker.new_syncs]
        self.syncs.extend(new)
        return new
