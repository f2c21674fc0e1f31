"""What the driver makes of a step's numbers: times, rates, the state of store and workers, and what is alarming."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.records import RolloutStats, SyncRecord

SATURATED_STEPS = 10
"""Learner steps with λ at its ceiling after which the run says so."""
DISCARDED_STEPS = 10
"""Learner steps without a single optimiser step, each for want of finite numbers, after which the run ends."""
UNSCORED_GROUPS = 16
"""Groups without enough verdicts after which the run says so, if they are the majority."""


_Counts = tuple[int, int, float, float]
"""Tokens, trajectories, busy and altogether seconds."""
_NOTHING: _Counts = (0, 0, 0.0, 0.0)


class StepMeter:
    """Turns running totals of the workers into rates per learner step."""

    def __init__(self) -> None:
        self._born_s = self._last_s = time.monotonic()
        self._counted: dict[str, _Counts] = {}
        self.syncs: list[SyncRecord] = []
        """Every sync of every worker so far."""

    def start(self, workers: Sequence[RolloutStats]) -> None:
        """The learner's loop begins: the first step's clock, and what it counts of the workers, run from here."""
        self._last_s = time.monotonic()
        self._count(workers)
        self.add_syncs(workers)

    def measure(
        self, *, step: int, wait_s: float, store: dict[str, Any], workers: Sequence[RolloutStats]
    ) -> dict[str, Any]:
        """Metrics of a step that has just ended, after the learner waited ``wait_s`` for its batch."""
        now_s = time.monotonic()
        step_s, self._last_s = now_s - self._last_s, now_s
        tokens, trajectories, busy_s, alive_s = self._count(workers)
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
            "replay/held_groups": store["held_groups"],
            "replay/held_bytes": store["held_bytes"],
            "replay/no_signal": store["no_signal"],
            **{f"replay/{reason}": count for reason, count in store["unusable"].items()},
            **{f"replay/uses_{kind}": count for kind, count in store["uses"].items()},
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

    def _count(self, workers: Sequence[RolloutStats]) -> _Counts:
        """What the workers have done since they were last counted; who is new is counted from its beginning."""
        now = {w.worker: (w.tokens, w.trajectories, w.busy_s, w.alive_s) for w in workers}
        since = [
            [new - old for new, old in zip(counts, self._counted.get(worker, _NOTHING), strict=True)]
            for worker, counts in now.items()
        ]
        self._counted |= now
        tokens, trajectories, busy_s, alive_s = (sum(column) for column in zip(*since, _NOTHING, strict=True))
        return int(tokens), int(trajectories), busy_s, alive_s


def outcomes_text(store: Mapping[str, Any]) -> str:
    """What became of all trajectories: ``12 scored, 4 timeout``."""
    return ", ".join(f"{count} {outcome}" for outcome, count in store["outcomes"].items() if count) or "none"


def stall_text(store: Mapping[str, Any], *, step: int, limit_s: float) -> str:
    """Why the run ends: the learner has waited ``limit_s`` seconds in vain."""
    waits = "; ".join([*store["troubles"], *(f"{wait['who']} waits for {wait['what']}" for wait in store["waits"])])
    return (
        f"no group to train on for {limit_s:g} s at step {step}: {waits}; trajectories so far: {outcomes_text(store)}"
    )


def _lasting(sentence: str) -> str:
    """A sentence without the seconds that it counts: the same as long as the same thing is wrong."""
    return re.sub(r"\b\d+(\.\d+)? s\b", "… s", sentence)


class Alarms:
    """What a person should be told about a run that goes on, but not as one would wish."""

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self._algorithm = algorithm
        self._saturated_steps = 0
        self._discarded_steps = 0
        self._was_bad = False
        self._said_saturated = self._said_unscored = False
        self._troubles: dict[str, str] = {}

    def look(self, metrics: Mapping[str, Any]) -> list[str]:
        """Sentences about the step that has just ended.

        ``RuntimeError`` once ``DISCARDED_STEPS`` learner steps in a row have moved nothing.
        """
        return [sentence for sentence in (self._saturated(metrics), self._bad(metrics)) if sentence]

    def look_at(self, store: Mapping[str, Any]) -> list[str]:
        """Sentences about the store, given what it says of itself."""
        return [*self._trouble(store), *self._unscored(store)]

    def _trouble(self, store: Mapping[str, Any]) -> list[str]:
        """Said when it begins and when it is over: something keeps the store from working as it should.

        Shards that are away are left out, since the one who starts them again speaks of them.
        """
        away = {shard["trouble"] for shard in store["shards"] if not shard["attached"]}
        now = {_lasting(sentence): sentence for sentence in store["troubles"] if sentence not in away}
        begun = [sentence for key, sentence in now.items() if key not in self._troubles]
        over = [sentence for key, sentence in self._troubles.items() if key not in now]
        self._troubles = now
        return [*begun, *(f"it is over: {sentence.partition(';')[0]}" for sentence in over)]

    def _unscored(self, store: Mapping[str, Any]) -> list[str]:
        """Said once: most groups lack the verdicts that training on them takes."""
        groups, unscored = store["groups"], store["unusable"]["unscored"]
        if self._said_unscored or unscored < UNSCORED_GROUPS or 2 * unscored <= groups:
            return []
        self._said_unscored = True
        return [
            f"{unscored} of {groups} groups have fewer verdicts than replay.min_verdicts, so that none is trained on "
            f"(trajectories: {outcomes_text(store)}); logs/rollout-*.log says why"
        ]

    def _saturated(self, metrics: Mapping[str, Any]) -> str:
        """Said once: λ has been at its ceiling for a while, so the budget cannot be held by it."""
        self._saturated_steps = self._saturated_steps + 1 if metrics.get("dual/saturated") else 0
        if self._saturated_steps < SATURATED_STEPS or self._said_saturated:
            return ""
        self._said_saturated = True
        return (
            f"λ has been at its ceiling {self._algorithm.lambda_max:g} for {SATURATED_STEPS} steps: the budget "
            f"δ={self._algorithm.delta:g} is infeasible here; lower learner.lr or raise algorithm.delta"
        )

    def _bad(self, metrics: Mapping[str, Any]) -> str:
        """Said when it begins: optimiser steps were discarded."""
        bad = metrics.get("learner/bad_steps", 0)
        nothing_moved = bad and "step/lr" not in metrics
        self._discarded_steps = self._discarded_steps + 1 if nothing_moved else 0
        if self._discarded_steps >= DISCARDED_STEPS:
            raise RuntimeError(
                f"the learner has discarded every optimiser step of the last {DISCARDED_STEPS} learner steps: loss or "
                "gradient is not finite (learner/bad_steps); lower learner.lr, and look at the model and its dtype"
            )
        began, self._was_bad = bool(bad) and not self._was_bad, bool(bad)
        if not began:
            return ""
        return (
            f"learner step {metrics['step']}: {bad:.0f} optimiser step{'' if bad == 1 else 's'} discarded, loss or "
            "gradient was not finite (learner/bad_steps in metrics.jsonl counts them)"
        )
