"""What is outstanding, in memory: ledger and waiting groups together, under the rules of the limiter.

It knows neither disk nor event loop; ``service`` keeps it in step with the store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from r2vpo.records import Lease, TrajectoryGroup
from replay.ledger import PromptLedger
from replay.limiter import Grant, LagLimiter
from replay.store import AHEAD, LATE


class Dispatcher:
    """Decides who gets a lease, when the learner may take its batch, and which groups come too late."""

    def __init__(self, *, limiter: LagLimiter, ledger: PromptLedger, waiting: dict[int, int], next_step: int) -> None:
        self.limiter = limiter
        self.ledger = ledger
        self.waiting = waiting
        """Usable fresh groups in the store that no batch has taken: id → oldest version."""
        self.next_step = next_step
        """The next step whose batch is still to be chosen."""

    def grant(self, *, worker: str, version: int, count: int) -> Grant:
        """How many leases the worker may have now."""
        return self.limiter.grant(
            worker=worker,
            version=version,
            count=count,
            waiting=self._waiting_versions(),
            in_flight=self._in_flight(),
            next_step=self.next_step,
        )

    def lease(self, *, worker: str, version: int, count: int, now_s: float, lease_s: float) -> tuple[Lease, ...]:
        """As many leases as were granted."""
        return tuple(
            self.ledger.lease(worker=worker, version=version, now_s=now_s, lease_s=lease_s) for _ in range(count)
        )

    def lacking(self) -> str:
        """What the next batch waits for, with the names of those who hold it; empty if it may be taken."""
        lacking = self.limiter.lacking(self._waiting_versions(), self._in_flight(), next_step=self.next_step)
        if not lacking or not self.ledger.live:
            return lacking
        held = sorted(self.ledger.live.values(), key=lambda held: held.lease.version)
        names = ", ".join(f"{h.lease.key} ({h.worker})" for h in held[:8])
        return f"{lacking}: {names}{', …' if len(held) > 8 else ''}"

    def unusable(self, groups: Iterable[TrajectoryGroup]) -> dict[str, str]:
        """Reasons, by key, for new groups that cannot train. One under a live lease always fits; a late one may not."""
        outstanding = self._waiting_versions()
        in_flight = {key: held.lease.version for key, held in self.ledger.live.items()}
        reasons = {}
        for group in groups:
            in_flight.pop(group.key, None)
            others = [*outstanding, *in_flight.values()]
            if group.newest_version > self.next_step:
                reasons[group.key] = AHEAD
            elif self.limiter.room(others, version=group.oldest_version, next_step=self.next_step) < 1:
                reasons[group.key] = LATE
            elif group.num_scored >= 2:
                outstanding.append(group.oldest_version)
        return reasons

    def appended(self, group: TrajectoryGroup, group_id: int, *, usable: bool) -> None:
        """The group is new in the store: its lease ends, and it waits for the learner if it can train."""
        self.ledger.answered(group.key)
        if usable:
            self.waiting[group_id] = group.oldest_version

    def taken(self, step: int, group_ids: Sequence[int]) -> None:
        """The batch of ``step`` is chosen."""
        for group_id in group_ids:
            self.waiting.pop(group_id, None)  # stale ones were not waiting
        self.next_step = step + 1

    def _waiting_versions(self) -> list[int]:
        return list(self.waiting.values())

    def _in_flight(self) -> list[int]:
        return [held.lease.version for held in self.ledger.live.values()]
