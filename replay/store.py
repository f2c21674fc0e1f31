"""The durable store of trajectory groups: plain Python over one SQLite file, which any SQLite tool can read.

    append_many ──▶ groups + payloads ──sample──▶ choice ──commit(step)──▶ consumption + steps ──rewind──▶ undone

A group is never changed. Beside it stand: the *choice* (the batch handed out for the next step, not committed yet, so
that asking again gives the same one), *consumption* (which step trained on which group, as what) and *steps* (what is
committed). Every change is one transaction in WAL mode with synchronous=FULL: what a call returned is on disk. The
version of the store is the number of the next learner step.

Fresh groups are taken by earliest due step, i.e. oldest version, then id (see ``limiter``, which decides when a step
may take them); stale ones by a draw that depends on the seed and the step alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash

from r2vpo.records import Kind, Outcome, SampledBatch, SampledGroup, TrajectoryGroup
from replay.database import Database
from replay.errors import LagViolation, ReplayError
from replay.schema import group_columns
from replay.serialize import decode, encode

UNSCORED = "unscored"
"""Unusable: fewer than two members carry a verdict, so nothing can be compared."""
LATE = "late"
"""Unusable: it arrived after its lease expired, when its due step could no longer be met."""
AHEAD = "ahead"
"""Unusable: it holds tokens of versions that the learner has not reached, or that a rewind has undone."""

_USABLE_FRESH = "unusable IS NULL AND NOT EXISTS (SELECT 1 FROM consumption c WHERE c.group_id = groups.id)"


class ReplayStore:
    """The one writer of a store file, in one thread. ``ReplayStore.read_only`` opens it for inspection beside a writer.

    Every method raises ``ReplayError`` with the file and SQLite's own words when the disk is full, the file is
    read-only or damaged, or another process writes the store.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._db = Database(path, read_only=read_only)

    @classmethod
    def read_only(cls, path: Path) -> ReplayStore:
        """Open an existing store for reading, also while another process writes it."""
        return cls(path, read_only=True)

    def close(self) -> None:
        """Fold the log into the file and let go of it. May be called twice."""
        self._db.close()

    @property
    def version(self) -> int:
        """Number of the next learner step; all before it are committed."""
        return self._db.one("SELECT COALESCE(MAX(step) + 1, 0) FROM steps")

    def append_many(
        self, groups: Sequence[TrajectoryGroup], unusable: Mapping[str, str] = MappingProxyType({})
    ) -> list[bool]:
        """Make groups durable in one transaction. False for a key that is there already, whose group stays as it is.

        ``unusable`` (key → reason) names groups that are kept and counted, never sampled; a group with fewer than two
        verdicts always is. ``ValueError`` for a malformed group: then none is stored.
        """
        payloads = [encode(group) for group in groups]
        with self._db.transaction():
            return [
                self._insert(group, payload, UNSCORED if group.num_scored < 2 else unusable.get(group.key))
                for group, payload in zip(groups, payloads, strict=True)
            ]

    def set_aside(self, reasons: Mapping[int, str]) -> None:
        """Mark groups (id → reason) as unusable: kept and counted, never sampled."""
        with self._db.transaction():
            self._db.execute_many(
                "UPDATE groups SET unusable = ? WHERE id = ?", [(reason, i) for i, reason in reasons.items()]
            )

    def sample(
        self, *, step: int, num_fresh: int, num_stale: int, max_lag: int, max_replay_lag: int, seed: int
    ) -> SampledBatch | None:
        """The batch of ``step``, or None while fewer than ``num_fresh`` usable fresh groups are there.

        Takes as many stale groups as are eligible, up to ``num_stale``, without replacement. The choice is remembered
        until it is committed or rewound. ``ValueError`` unless ``step`` is the next one, ``LagViolation`` if a group
        is outside its bound.
        """
        assert num_fresh >= 1, num_fresh
        with self._db.transaction():
            if step != self.version:
                raise ValueError(f"step {step} cannot be sampled: the next step of {self.path} is {self.version}")
            chosen = self._choice()
            if not chosen:
                fresh = self._db.column(
                    f"SELECT id FROM groups WHERE {_USABLE_FRESH} ORDER BY oldest_version, id LIMIT ?", num_fresh
                )
                if len(fresh) < num_fresh:
                    return None
                stale = self._draw_stale(step, num_stale, max_replay_lag, seed)
                chosen = [*((i, Kind.FRESH) for i in fresh), *((i, Kind.STALE) for i in stale)]
                self._db.execute_many(
                    "INSERT INTO choice (position, step, group_id, kind) VALUES (?, ?, ?, ?)",
                    [(position, step, i, kind.value) for position, (i, kind) in enumerate(chosen)],
                )
            for group_id, kind in chosen:
                self._check_lag(group_id, kind, step, max_lag if kind is Kind.FRESH else max_replay_lag)
            return SampledBatch(
                step=step,
                groups=tuple(
                    SampledGroup(group_id=i, kind=kind, uses=self._uses(i), group=self.get(i)) for i, kind in chosen
                ),
            )

    def commit(self, *, step: int, group_ids: Sequence[int]) -> None:
        """Record the batch of ``step`` as consumed. The same commit again does nothing.

        ``ValueError`` if the ids are not those that were sampled for the step, or the step is not the next one.
        """
        with self._db.transaction():
            version = self.version
            if step > version:
                raise ValueError(f"step {step} cannot be committed before step {version}")
            if step < version:
                expected = self._db.column("SELECT group_id FROM consumption WHERE step = ?", step)
            else:
                expected = [i for i, _ in self._choice()]
            if not group_ids or sorted(group_ids) != sorted(expected):
                state = "was committed with" if step < version else "was sampled as"
                raise ValueError(f"step {step} {state} groups {sorted(expected)}, not with {sorted(group_ids)}")
            if step == version:
                self._db.execute("INSERT INTO steps (step, committed_s) VALUES (?, ?)", (step, time.time()))
                self._db.execute(
                    "INSERT INTO consumption (step, group_id, kind, position) "
                    "SELECT step, group_id, kind, position FROM choice"
                )
                self._db.execute("DELETE FROM choice")

    def committed_batch(self, step: int) -> SampledBatch:
        """The batch that a committed step consumed, as it was then. ``LookupError`` if the step is not committed."""
        rows = self._db.rows(
            "SELECT group_id, kind, "
            "(SELECT COUNT(*) FROM consumption e WHERE e.group_id = c.group_id AND e.step < c.step) "
            "FROM consumption c WHERE step = ? ORDER BY position",
            step,
        )
        if not rows:
            raise LookupError(f"{self.path} has no committed step {step}; it knows {self.version} steps")
        return SampledBatch(
            step=step,
            groups=tuple(
                SampledGroup(group_id=i, kind=Kind(kind), uses=uses, group=self.get(i)) for i, kind, uses in rows
            ),
        )

    def rewind(self, step: int) -> int:
        """Undo what was consumed by ``step`` and all after it, so that ``step`` is the next one.

        Groups with tokens of later versions become unusable, as the weights that sampled them are gone; returns their
        number. ``ValueError`` if the store has not come as far as ``step``.
        """
        with self._db.transaction():
            if not 0 <= step <= self.version:
                raise ValueError(
                    f"{self.path} knows {self.version} committed steps and cannot go on at step {step}: "
                    "checkpoint and store do not belong together"
                )
            self._db.execute("DELETE FROM choice")
            self._db.execute("DELETE FROM consumption WHERE step >= ?", (step,))
            self._db.execute("DELETE FROM steps WHERE step >= ?", (step,))
            return self._db.execute(
                "UPDATE groups SET unusable = ? WHERE unusable IS NULL AND newest_version > ?", (AHEAD, step)
            ).rowcount

    def get(self, group_id: int) -> TrajectoryGroup:
        """One group. ``LookupError`` for an unknown id, ``ReplayError`` for a damaged payload."""
        rows = self._db.rows("SELECT payload, checksum FROM payloads WHERE group_id = ?", group_id)
        if not rows:
            raise LookupError(f"{self.path} has no group with id {group_id}")
        payload, checksum = rows[0]
        if xxhash.xxh3_128_hexdigest(payload) != checksum:
            raise ReplayError(
                f"{self.path}: the payload of group {group_id} is damaged, its bytes do not match their checksum; "
                "restore the file from a backup, or start a new run from a checkpoint"
            )
        return decode(payload)

    def keys(self) -> list[str]:
        """The key of every group, in order of arrival."""
        return self._db.column("SELECT key FROM groups ORDER BY id")

    def ids(self, keys: Iterable[str]) -> dict[str, int]:
        """The id of each key that is in the store."""
        found = {key: self._db.column("SELECT id FROM groups WHERE key = ?", key) for key in keys}
        return {key: ids[0] for key, ids in found.items() if ids}

    def waiting(self) -> dict[int, int]:
        """Usable groups that were never consumed: id → oldest version, by earliest due step. The choice is included."""
        return dict(
            self._db.rows(f"SELECT id, oldest_version FROM groups WHERE {_USABLE_FRESH} ORDER BY oldest_version, id")
        )

    def stale_eligible(self, *, step: int, max_replay_lag: int) -> list[int]:
        """Ids that ``step`` may sample again: consumed before, with signal, within ``max_replay_lag``."""
        return self._db.column(
            "SELECT id FROM groups WHERE oldest_version >= ? AND has_signal "
            "AND EXISTS (SELECT 1 FROM consumption c WHERE c.group_id = groups.id AND c.step < ?) ORDER BY id",
            step - max_replay_lag,
            step,
        )

    def stats(self) -> dict[str, Any]:
        """Counts over everything ever stored."""
        totals = (
            "COUNT(*)",
            "SUM(num_trajectories)",
            "SUM(num_sampled_tokens)",
            *(f"SUM(num_{o.value})" for o in Outcome),
        )
        row = self._db.rows(f"SELECT {', '.join(totals)} FROM groups")[0]
        groups, trajectories, tokens, *outcomes = (value or 0 for value in row)
        unusable = dict(self._db.rows("SELECT unusable, COUNT(*) FROM groups WHERE unusable IS NOT NULL GROUP BY 1"))
        uses = dict(self._db.rows("SELECT kind, COUNT(*) FROM consumption GROUP BY 1"))
        return {
            "version": self.version,
            "groups": groups,
            "trajectories": trajectories,
            "sampled_tokens": tokens,
            "outcomes": {o.value: n for o, n in zip(Outcome, outcomes, strict=True)},
            "uses": {kind.value: uses.get(kind.value, 0) for kind in Kind},
            "unusable": {reason: unusable.get(reason, 0) for reason in (UNSCORED, LATE, AHEAD)},
        }

    def verify(self) -> list[str]:
        """Read everything and return one sentence per problem; empty if the store is sound."""
        problems = [f"SQLite: {row[0]}" for row in self._db.rows("PRAGMA integrity_check") if row[0] != "ok"]
        problems += [f"SQLite: row without its parent in {row[0]}" for row in self._db.rows("PRAGMA foreign_key_check")]
        if (num_steps := self._db.one("SELECT COUNT(*) FROM steps")) != self.version:
            problems.append(f"{num_steps} committed steps, but the next one is {self.version}: a step is missing")
        for group_id, key in self._db.rows("SELECT id, key FROM groups ORDER BY id"):
            try:
                group = self.get(group_id)
            except (ReplayError, LookupError, ValueError) as error:
                problems.append(str(error))
                continue
            columns = group_columns(group)
            row = self._db.rows(f"SELECT {', '.join(columns)} FROM groups WHERE id = ?", group_id)[0]
            wrong = [name for name, value in zip(columns, row, strict=True) if columns[name] != value]
            if wrong:
                problems.append(f"group {group_id} ({key}): {', '.join(wrong)} contradict its payload")
        return problems

    def _insert(self, group: TrajectoryGroup, payload: bytes, unusable: str | None) -> bool:
        columns = group_columns(group)
        columns["unusable"] = unusable
        columns["appended_s"] = time.time()
        cursor = self._db.execute(
            f"INSERT INTO groups ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
            "ON CONFLICT (key) DO NOTHING",
            tuple(columns.values()),
        )
        if cursor.rowcount == 0:
            return False
        self._db.execute(
            "INSERT INTO payloads (group_id, payload, checksum) VALUES (?, ?, ?)",
            (cursor.lastrowid, payload, xxhash.xxh3_128_hexdigest(payload)),
        )
        return True

    def _draw_stale(self, step: int, num_stale: int, max_replay_lag: int, seed: int) -> list[int]:
        eligible = self.stale_eligible(step=step, max_replay_lag=max_replay_lag)
        rng = np.random.default_rng([seed, step])
        return rng.choice(eligible, size=min(num_stale, len(eligible)), replace=False).tolist() if eligible else []

    def _check_lag(self, group_id: int, kind: Kind, step: int, bound: int) -> None:
        key, oldest, newest = self._db.rows(
            "SELECT key, oldest_version, newest_version FROM groups WHERE id = ?", group_id
        )[0]
        if step - oldest > bound or newest > step:
            raise LagViolation(
                f"{self.path}: {kind.value} group {group_id} ({key}) holds versions {oldest} to {newest}; at "
                f"step {step} its lag must lie between 0 and {bound}"
            )

    def _choice(self) -> list[tuple[int, Kind]]:
        return [(i, Kind(kind)) for i, kind in self._db.rows("SELECT group_id, kind FROM choice ORDER BY position")]

    def _uses(self, group_id: int) -> int:
        return self._db.one("SELECT COUNT(*) FROM consumption WHERE group_id = ?", group_id)
