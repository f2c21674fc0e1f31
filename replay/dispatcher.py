"""What is outstanding, in memory: ledger and waiting groups together, under the rules of the limiter.

It knows neither disk nor event loop; ``service`` keeps it in step with the store. What lies on a shard that is away is
left out of every count until the shard returns: others neither wait for it nor are crowded out by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from r2vpo.records import Lease, prompt_key
from replay.ledger import PromptLedger
from replay.limiter import Grant, LagLimiter
from replay.rows import Rows, shard_of_id, shard_of_key

LATE = "late"
"""Not fresh any more: it came, or came back, when its due step could no longer be met. Stale draws may take it."""
AHEAD = "ahead"
"""Never drawn: it holds tokens of versions that the learner has not reached, or that a rewind has undone."""
DAMAGED = "damaged"
"""Never drawn: its payload cannot be read as it was written."""


class Dispatcher:
    """Decides who gets a lease, which fresh groups a step takes and when, and which groups come too late."""

    def __init__(
        self,
        *,
        limiter: LagLimiter,
        ledger: PromptLedger,
        waiting: dict[int, int],
        next_step: int,
        shards: int = 1,
    ) -> None:
        self.limiter = limiter
        self.ledger = ledger
        self.waiting = waiting
        """Fresh groups that no batch has taken: id → oldest version."""
        self.next_step = next_step
        """The next step whose batch is still to be chosen."""
        self._shards = shards
        self._away: set[int] = set()
        self._overdue: set[str] = set()

    @property
    def away(self) -> frozenset[int]:
        """Shards that cannot be reached for the time being."""
        return frozenset(self._away)

    def grant(self, *, worker: str, version: int, count: int) -> Grant:
        """How many leases the worker may have now."""
        if len(self._away) == self._shards:
            return Grant(count=0, reason=f"{_shards_text(self._away)} away: nothing could be stored")
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
        if not lacking:
            return ""
        if self._away:
            lacking = f"{lacking}; {_shards_text(self._away)} away"
        if not self.ledger.live:
            return lacking
        held = sorted(self.ledger.live.values(), key=lambda held: held.lease.version)
        names = ", ".join(f"{h.lease.key} ({h.worker})" for h in held[:8])
        return f"{lacking}: {names}{', …' if len(held) > 8 else ''}"

    def earliest_due(self) -> list[int]:
        """The F waiting groups that the next step takes: oldest version first, then lowest id."""
        there = ((version, i) for i, version in self.waiting.items() if self._is_there(i))
        return [i for _, i in sorted(there)[: self.limiter.num_fresh]]

    def unusable(self, rows: Rows, fresh: Sequence[bool]) -> dict[int, str]:
        """Reasons, by id, for new groups that cannot wait for a batch. One under a live lease fits; a late one may not.

        ``fresh`` says of each row whether it could train as a fresh group at all.
        """
        outstanding = self._waiting_versions()
        in_flight = self._jobs_in_flight()
        reasons: dict[int, str] = {}
        for row, is_fresh in zip(rows, fresh, strict=True):
            in_flight.pop(_key(row), None)
            oldest = int(row["oldest_version"])
            if row["newest_version"] > self.next_step:
                reasons[int(row["id"])] = AHEAD
            elif is_fresh:
                others = [*outstanding, *in_flight.values()]
                if self.limiter.room(others, version=oldest, next_step=self.next_step) < 1:
                    reasons[int(row["id"])] = LATE
                else:
                    outstanding.append(oldest)
        return reasons

    def appended(self, row: Rows, *, waits: bool) -> None:
        """The group (a single row) is new in the store: its lease ends, and it waits for the learner if it can."""
        key = _key(row)
        self.ledger.answered(key)
        self._overdue.discard(key)
        if waits:
            self.waiting[int(row["id"])] = int(row["oldest_version"])

    def taken(self, step: int, group_ids: Iterable[int]) -> None:
        """The fresh groups of ``step`` are chosen."""
        for group_id in group_ids:
            del self.waiting[group_id]
        self.next_step = step + 1

    def untaken(self, step: int, waiting: dict[int, int]) -> None:
        """The choice of ``step`` is undone: these of its fresh groups wait again."""
        self.waiting |= waiting
        self.next_step = step

    def leave(self, shard: int) -> None:
        """A shard is away: its groups and prompts wait for it, and nobody else does."""
        self._away.add(shard)
        self.ledger.keep_back(shard)

    def return_(self, shard: int) -> list[int]:
        """A shard is back; returns those of its waiting groups that can no longer be trained as fresh in time."""
        outstanding = [*self._waiting_versions(), *self._in_flight()]  # nothing of these may be pushed out
        self._away.discard(shard)
        self.ledger.bring_back(shard)
        back: list[tuple[int, int | str]] = [(version, i) for i, version in self.waiting.items()]
        back += [(held.lease.version, key) for key, held in self.ledger.live.items() if key not in self._overdue]
        left: list[int | str] = []
        for version, name in sorted((job for job in back if self._shard_of(job[1]) == shard), key=lambda job: job[0]):
            if self.limiter.room(outstanding, version=version, next_step=self.next_step) >= 1:
                outstanding.append(version)
            else:
                left.append(name)
        late = [name for name in left if isinstance(name, int)]
        self._overdue |= {name for name in left if isinstance(name, str)}
        for group_id in late:
            del self.waiting[group_id]
        return late

    def _waiting_versions(self) -> list[int]:
        return [version for i, version in self.waiting.items() if self._is_there(i)]

    def _in_flight(self) -> list[int]:
        return list(self._jobs_in_flight().values())

    def _jobs_in_flight(self) -> dict[str, int]:
        """Key → version of the leases that count."""
        self._overdue &= self.ledger.live.keys()
        return {
            key: held.lease.version
            for key, held in self.ledger.live.items()
            if key not in self._overdue and self._is_there(key)
        }

    def _is_there(self, name: int | str) -> bool:
        return not self._away or self._shard_of(name) not in self._away

    def _shard_of(self, name: int | str) -> int:
        return shard_of_id(name, self._shards) if isinstance(name, int) else shard_of_key(name, self._shards)


def _key(row: Rows) -> str:
    return prompt_key(int(row["epoch"]), int(row["prompt_index"]))


def _shards_text(shards: Iterable[int]) -> str:
    numbers = sorted(shards)
    return (
        f"replay shard{'s' * (len(numbers) != 1)} {', '.join(map(str, numbers))} {'are' if len(numbers) > 1 else 'is'}"
    )
