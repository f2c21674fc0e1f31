"""What the driver makes of a step's numbers: times, rates, the state of store and workers, and what is alarming."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

from r2vpo.job.config import RunConfig
from r2vpo.records import RolloutStats, SyncRecord

SATURATED_STEPS = 10
"""Learner steps with λ at its ceiling after which the run says so."""
COLLAPSE_STEPS = 20
"""Learner steps without any signal after which the run says so: longer than chance leaves a policy that still learns,
and short enough to save most of what a run without a purpose would cost."""
NO_ENTROPY = 0.01
"""Entropy (nats per token) below which a policy gives the same response every time: a token in 500 is another one."""
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

    def __init__(self, config: RunConfig) -> None:
        self._algorithm, self._max_bad_steps = config.algorithm, config.learner.max_bad_steps
        self._fresh_per_step = config.num_fresh
        rule = config.replay.skip_no_signal
        self._skips_silent = rule if config.replay.no_signal_rule == "all" else ""
        self._saturated_steps = self._silent_steps = 0
        self._discarded_steps = 0
        self._with_signal = self._silent_before = 0
        self._best_reward, self._worst_reward = -inf, inf
        self._was_bad = False
        self._said_saturated = self._said_unscored = self._said_collapsed = False
        self._troubles: dict[str, str] = {}

    @property
    def is_sound(self) -> bool:
        """Whether the newest weights are worth a checkpoint: the last learner step was not discarded as a whole."""
        return self._discarded_steps == 0

    def look(self, metrics: Mapping[str, Any]) -> list[str]:
        """Sentences about the step that has just ended.

        ``RuntimeError`` once more than ``learner.max_bad_steps`` learner steps in a row have moved nothing.
        """
        said = (self._saturated(metrics), self._bad(metrics), self._collapsed(metrics))
        return [sentence for sentence in said if sentence]

    def look_at(self, store: Mapping[str, Any]) -> list[str]:
        """Sentences about the store, given what it says of itself."""
        return [*self._trouble(store), *self._unscored(store), *self._starved(store)]

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
        bad, moved = metrics.get("learner/bad_steps", 0), "step/lr" in metrics
        if moved or bad:  # else the batch had nothing to train on, which says nothing
            self._discarded_steps = 0 if moved else self._discarded_steps + 1
        if self._discarded_steps > self._max_bad_steps:
            raise RuntimeError(
                f"the learner has discarded every optimiser step of the last {self._discarded_steps} learner steps, "
                f"more than learner.max_bad_steps={self._max_bad_steps} in a row: loss or gradient is not finite; "
                "logs/learner-0.log names what was not, and the groups; the last checkpoint was written before that: "
                "go on from it with a lower rate (--resume learner.lr=… --allow-change learner.lr)"
            )
        began, self._was_bad = bool(bad) and not self._was_bad, bool(bad)
        if not began:
            return ""
        return (
            f"learner step {metrics['step']}: {bad:.0f} optimiser step{'' if bad == 1 else 's'} discarded, loss or "
            "gradient was not finite (logs/learner-0.log names the groups, learner/bad_steps in metrics.jsonl counts)"
        )

    def _collapsed(self, metrics: Mapping[str, Any]) -> str:
        """Said once: no batch has had a signal for a while; why, as far as rewards and entropy tell."""
        if "train/reward_mean" not in metrics:  # no verdicts at all: that is said elsewhere
            return ""
        self._best_reward = max(self._best_reward, metrics["train/reward_max"])
        self._worst_reward = min(self._worst_reward, metrics["train/reward_min"])
        silent = metrics["train/zero_signal_fraction"] == 1
        self._silent_steps = self._silent_steps + 1 if silent else 0
        if self._silent_steps < COLLAPSE_STEPS or self._said_collapsed:
            return ""
        self._said_collapsed = True
        why = self._why_silent(lowest=metrics["train/reward_min"], highest=metrics["train/reward_max"])
        entropy = metrics.get("step/entropy")
        if entropy is not None and entropy < NO_ENTROPY:
            why += (
                f"; and the policy has collapsed: with an entropy of {entropy:.2g} nats per token it gives the same "
                "response every time"
            )
        return f"no group of the last {COLLAPSE_STEPS} learner steps carries a signal, so nothing is learnt: {why}"

    def _why_silent(self, *, lowest: float, highest: float) -> str:
        """What the rewards of the newest batch, beside those so far, say about the want of a signal."""
        if lowest < highest:
            return "the members of each group get the same reward, and nothing tells them apart"
        if highest == self._best_reward and (highest > 0 or highest > self._worst_reward):
            return f"every reward is {highest:g}, the highest so far: the task looks solved; harder prompts would go on"
        if highest in (0, self._worst_reward):
            return (
                f"every reward is {highest:g}: the task is out of the policy's reach, or task.reward does not see what "
                "is right"
            )
        return f"every reward is {highest:g}"

    def _starved(self, store: Mapping[str, Any]) -> list[str]:
        """Said once: where groups without a signal are not drawn at all, the learner waits while nothing else comes."""
        silent = store["no_signal"]
        with_signal = store["groups"] - silent - store["unusable"]["unscored"]
        if with_signal > self._with_signal:
            self._with_signal, self._silent_before = with_signal, silent
        num = silent - self._silent_before
        if not self._skips_silent or self._said_collapsed or num < COLLAPSE_STEPS * self._fresh_per_step:
            return []
        self._said_collapsed = True
        return [
            f"none of the last {num} groups carries a signal, and replay.skip_no_signal={self._skips_silent} draws no "
            "others, so the learner waits: the rewards of each are equal, all low (the task is out of reach) or all "
            "high (it is solved)"
        ]
