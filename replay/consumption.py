"""What became of the groups: which step trained on which, what is chosen for the next step, and what is set aside.

    choose(plan) ──▶ choice ──commit(step)──▶ steps + consumption ──rewind(step)──▶ undone

The *choice* is the batch handed out for the next step, not committed yet, so that asking again gives the same one,
also after a crash. A commit is one transaction. The version of the log is the number of the next learner step.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from r2vpo.records import BatchPlan, Draw, Kind
from replay.database import Database, clear_errors, reading
from replay.errors import ReplayError
from replay.lock import StoreLock
from replay.migration import CONSUMPTION_MIGRATIONS, fill_from_version_1, version_1_beside
from replay.schema import CONSUMPTION_TABLES, SCHEMA_VERSION

LATE = "late"
"""Set aside: it came, or came back, when its due step could no longer be met. A rewind gives it another chance."""


class ConsumptionLog:
    """The one writer of a run's consumption log, or a reader beside it (``read_only``). One thread at a time.

    Every method raises ``ReplayError`` with the file and SQLite's own words when it is damaged, read-only, or written
    by another process, and ``DiskFull`` when the same call may work later.
    """

    def __init__(self, path: Path, *, shards: int | None = None, read_only: bool = False) -> None:
        """``shards`` is noted in a new file (None: 1). ``ValueError`` if an existing one notes another number."""
        self.path = path
        with ExitStack() as undo:
            fill = _fill(path, shards, undo) if not read_only else None
            self._db = Database(
                path,
                read_only=read_only,
                tables=CONSUMPTION_TABLES,
                schema_version=SCHEMA_VERSION,
                migrate=CONSUMPTION_MIGRATIONS,
                fill=fill,
            )
        try:
            self.shards = int(self._db.meta("shards") or 1)
            if shards not in (None, self.shards):
                raise ValueError(
                    f"replay.shards={shards}, but {path} was written with replay.shards={self.shards}: the place of a "
                    f"group follows from their number; set replay.shards={self.shards}, or start a new run"
                )
            self._uses: Counter[str] | None = None if read_only else self._count_uses()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Fold the log into the file and let go of it. May be called twice."""
        self._db.close()

    @property
    def version(self) -> int:
        """Number of the next learner step; all before it are committed."""
        return self._db.one("SELECT COALESCE(MAX(step) + 1, 0) FROM steps")

    @property
    def hosts(self) -> dict[int, str]:
        """Shard → name of the machine on whose disk its file lies, as far as noted."""
        return {int(shard): host for shard, host in json.loads(self._db.meta("hosts") or "{}").items()}

    def set_hosts(self, hosts: Mapping[int, str]) -> None:
        """Note where the shards' files lie."""
        with self._db.transaction():
            self._db.set_meta("hosts", json.dumps(dict(hosts)))

    def chosen(self) -> BatchPlan | None:
        """The batch that was handed out for the next step and is not committed."""
        rows = self._db.rows("SELECT step, group_id, kind, uses, weight FROM choice ORDER BY position")
        return _plan(rows[0][0], [row[1:] for row in rows]) if rows else None

    def choose(self, plan: BatchPlan) -> None:
        """Remember the batch of the next step, in place of one chosen before.

        ``ValueError`` if the plan is for another step, is empty, or names a group twice.
        """
        if plan.step != self.version:
            raise ValueError(f"step {plan.step} cannot be chosen: the next step of {self.path} is {self.version}")
        if not plan.draws or len(set(plan.group_ids)) < len(plan.draws):
            raise ValueError(
                f"step {plan.step} cannot train on groups {sorted(plan.group_ids)}: each once, at least one"
            )
        with self._db.transaction():
            self._db.execute("DELETE FROM choice")
            self._db.execute_many(
                "INSERT INTO choice (position, step, group_id, kind, uses, weight) VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (position, plan.step, draw.group_id, draw.kind.value, draw.uses, draw.weight)
                    for position, draw in enumerate(plan.draws)
                ],
            )

    def drop_choice(self) -> None:
        """Forget the batch that was chosen and is not committed."""
        with self._db.transaction():
            self._db.execute("DELETE FROM choice")

    def commit(self, *, step: int, group_ids: Sequence[int]) -> None:
        """Record the batch of ``step`` as consumed. The same commit again does nothing.

        ``ValueError`` if the ids are not those that were sampled for the step, or the step is not the next one.
        """
        with self._db.transaction():
            version = self.version
            if step > version:
                raise ValueError(f"step {step} cannot be committed before step {version}")
            table = "consumption" if step < version else "choice"
            expected = self._db.column(f"SELECT group_id FROM {table} WHERE step = ?", step)
            if not group_ids or sorted(group_ids) != sorted(expected):
                state = "was committed with" if step < version else "was sampled as"
                raise ValueError(f"step {step} {state} groups {sorted(expected)}, not with {sorted(group_ids)}")
            kinds: list[str] = []
            if step == version:
                self._db.execute("INSERT INTO steps (step, committed_s) VALUES (?, ?)", (step, time.time()))
                self._db.execute(
                    "INSERT INTO consumption (step, group_id, kind, position, uses, weight) "
                    "SELECT step, group_id, kind, position, uses, weight FROM choice"
                )
                kinds = self._db.column("SELECT kind FROM choice")
                self._db.execute("DELETE FROM choice")
        if self._uses is not None:
            self._uses.update(kinds)

    def plan(self, step: int) -> BatchPlan:
        """The batch that a committed step consumed, as it was then. ``LookupError`` if the step is not committed."""
        rows = self._db.rows(
            "SELECT group_id, kind, uses, weight FROM consumption WHERE step = ? ORDER BY position", step
        )
        if not rows:
            raise LookupError(f"{self.path} has no committed step {step}; it knows {self.version} steps")
        return _plan(step, rows)

    def rewind(self, step: int) -> None:
        """Undo what was consumed by ``step`` and all after it, so that ``step`` is the next one.

        Late groups get another chance. ``ValueError`` if the log has not come as far as ``step``.
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
            self._db.execute("DELETE FROM set_aside WHERE reason = ?", (LATE,))
        if self._uses is not None:
            self._uses = self._count_uses()

    def uses(self, *, oldest_id: int = 0) -> np.ndarray:
        """int64 ``[n, 2]``: id and number of consumptions of each group that was consumed, from ``oldest_id`` on."""
        query = "SELECT group_id, COUNT(*) FROM consumption WHERE group_id >= ? GROUP BY group_id ORDER BY group_id"
        cursor = self._db.execute(query, (oldest_id,))
        with clear_errors(self.path):
            return np.fromiter(cursor, dtype=np.dtype((np.int64, 2)))

    def consumed_since(self, step: int) -> set[int]:
        """Ids of the groups that ``step`` or a later one consumed."""
        return set(self._db.column("SELECT group_id FROM consumption WHERE step >= ?", step))

    def set_aside(self, reasons: Mapping[int, str]) -> None:
        """Note groups (id → reason) that are not to be drawn as usual. A new reason replaces an old one."""
        with self._db.transaction():
            self._db.execute_many(
                "INSERT OR REPLACE INTO set_aside (group_id, reason) VALUES (?, ?)", list(reasons.items())
            )

    def aside(self) -> dict[int, str]:
        """Groups set aside: id → reason."""
        return dict(self._db.rows("SELECT group_id, reason FROM set_aside ORDER BY group_id"))

    def stats(self) -> dict[str, Any]:
        """``version``, ``uses`` (kind → number of consumptions) and ``aside`` (reason → number of groups)."""
        uses = self._count_uses() if self._uses is None else self._uses
        return {
            "version": self.version,
            "uses": {kind.value: uses[kind.value] for kind in Kind},
            "aside": dict(self._db.rows("SELECT reason, COUNT(*) FROM set_aside GROUP BY 1 ORDER BY 1")),
        }

    def verify(self) -> Iterator[str]:
        """Read everything and yield one sentence per problem; nothing if the log is sound."""
        try:
            yield from self._db.problems()
            # Each check is one query: beside a writer, two of them may see different steps.
            next_step = "COALESCE(MAX(step) + 1, 0)"
            num_steps, version = self._db.rows(f"SELECT COUNT(*), {next_step} FROM steps")[0]
            if num_steps != version:
                yield f"{self.path}: {num_steps} committed steps, but the next one is {version}: a step is missing"
            for (step,) in self._db.rows("SELECT step FROM steps EXCEPT SELECT step FROM consumption"):
                yield f"{self.path}: step {step} is committed without any group"
            for step, version in self._db.rows(
                f"SELECT DISTINCT step, version FROM choice, (SELECT {next_step} AS version FROM steps) "
                "WHERE step != version"
            ):
                yield f"{self.path}: a batch is chosen for step {step}, but the next one is {version}"
            wrong = (
                "SELECT step, group_id, uses, earlier FROM (SELECT step, group_id, uses, "
                "ROW_NUMBER() OVER (PARTITION BY group_id ORDER BY step) - 1 AS earlier FROM consumption) "
                "WHERE uses != earlier"
            )
            for step, group_id, uses, earlier in self._db.rows(wrong):
                yield (
                    f"{self.path}: step {step} notes {uses} earlier uses of group {group_id}, "
                    f"but {earlier} earlier steps consumed it"
                )
        except ReplayError as error:
            yield f"{error} (what comes after it was not looked at)"

    def _count_uses(self) -> Counter[str]:
        return Counter(dict(self._db.rows("SELECT kind, COUNT(*) FROM consumption GROUP BY 1")))


def _fill(path: Path, shards: int | None, undo: ExitStack) -> Callable[[sqlite3.Connection], object]:
    """What puts the first rows into a new log: its number of shards, and what a shard of version 1 beside it knows."""
    old = version_1_beside(path)
    if old is None:
        about = ("shards", str(shards or 1))
        return lambda connection: connection.execute("INSERT INTO meta (key, value) VALUES (?, ?)", about)
    if shards not in (None, 1):
        raise ValueError(
            f"replay.shards={shards}, but {old} was written with replay.shards=1: set that, or start a new run"
        )
    undo.callback(StoreLock(old).release)  # nobody may write it while it is read
    return lambda connection: _import(connection, old)


def _import(connection: sqlite3.Connection, old: Path) -> None:
    with reading(old) as shard:
        fill_from_version_1(connection, shard)


def _plan(step: int, rows: Sequence[tuple[int, str, int, float]]) -> BatchPlan:
    return BatchPlan(
        step=step,
        draws=tuple(Draw(group_id=i, kind=Kind(kind), uses=uses, weight=weight) for i, kind, uses, weight in rows),
    )
