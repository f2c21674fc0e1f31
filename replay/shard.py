"""One shard of the durable store: groups and their payloads in one SQLite file, which any SQLite tool can read.

    append_many ──▶ groups + payloads ──evict──▶ groups (the row stays: its prompt stays answered)

A group is never changed. What becomes of it (which step trained on it) stands in the consumption log. Every change is
one transaction: what a call returned is on disk. A key is stored once, whoever appends it how often.
"""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from r2vpo.records import Outcome
from replay.database import Database, clear_errors
from replay.errors import DamagedFile, ReplayError
from replay.migration import SHARD_MIGRATIONS
from replay.rows import ROW, EncodedGroup, Rows, shard_of_id, shard_of_key
from replay.schema import GROUP_COLUMNS, SCHEMA_VERSION, SHARD_TABLES, group_columns
from replay.serialize import decode

_ROW_COLUMNS = ", ".join(ROW.names or ())
_INSERT_GROUP = (
    f"INSERT INTO groups (id, appended_s, {', '.join(GROUP_COLUMNS)}) VALUES (?, ?{', ?' * len(GROUP_COLUMNS)}) "
    "ON CONFLICT (key) DO NOTHING"
)
_INSERT_PAYLOAD = "INSERT INTO payloads (group_id, payload, checksum) VALUES (?, ?, ?)"
_CHUNK = 256
"""Rows that ``verify`` looks at in one query: a long one would keep the log from being cut back."""
_COUNTS = {
    "groups": "COUNT(*)",
    "trajectories": "SUM(num_trajectories)",
    "sampled_tokens": "SUM(num_sampled_tokens)",
    **{outcome.value: f"SUM(num_{outcome.value})" for outcome in Outcome},
    "held_groups": "SUM(evicted_s IS NULL)",
    "held_bytes": "SUM(CASE WHEN evicted_s IS NULL THEN num_bytes ELSE 0 END)",
}


class ShardStore:
    """The one writer of a shard's file, or a reader beside it (``read_only``). One thread at a time.

    Every method raises ``ReplayError`` with the file and SQLite's own words when it is damaged, read-only, or written
    by another process, and ``DiskFull`` when the same call may work later.
    """

    def __init__(
        self, path: Path, *, shard: int = 0, shards: int = 1, read_only: bool = False, must_exist: bool = False
    ) -> None:
        """``ValueError`` if the file is that of another shard, or of another number of shards."""
        assert 0 <= shard < shards, (shard, shards)
        self.path = path
        self.shard = shard
        self.shards = shards
        self._db = Database(
            path,
            read_only=read_only,
            tables=SHARD_TABLES,
            schema_version=SCHEMA_VERSION,
            migrate=SHARD_MIGRATIONS,
            must_exist=must_exist,
            fill=lambda connection: _note_place(connection, shard, shards),
        )
        try:
            self._check_place()
            self._counts: dict[str, int] = {}
            self._verdicts: Counter[int] = Counter()  # groups by their number of verdicts …
            self._equal: Counter[int] = Counter()  # … and those of them whose verdicts do not differ
            if not read_only:
                self._count()
            self._next_id = 0 if read_only else self._first_free_id()
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Fold the log into the file and let go of it. May be called twice."""
        self._db.close()

    def append_many(self, groups: Sequence[EncodedGroup]) -> tuple[Rows, list[bool]]:
        """Make groups durable in one transaction. Returns the stored row of each, and whether it is new.

        A key that is there already, or twice in ``groups``, keeps its first group. ``ValueError`` for a malformed key.
        """
        for group in groups:
            assert shard_of_key(group.key, self.shards) == self.shard, f"{group.key} belongs to another shard"
        rows, new, next_id = np.zeros(len(groups), ROW), [], self._next_id
        now_s = time.time()
        with self._db.transaction():
            for position, group in enumerate(groups):
                values = [group.columns[name] for name in GROUP_COLUMNS]
                is_new = self._db.execute(_INSERT_GROUP, (next_id, now_s, *values)).rowcount == 1
                new.append(is_new)
                if is_new:
                    self._db.execute(_INSERT_PAYLOAD, (next_id, group.payload, group.checksum))
                    rows[position] = tuple(next_id if name == "id" else group.columns[name] for name in ROW.names or ())
                    next_id += self.shards
                else:
                    rows[position] = self._rows("WHERE key = ?", group.key)[0]
        self._next_id = next_id
        self._count_new([group.columns for group, is_new in zip(groups, new, strict=True) if is_new])
        return rows, new

    def rows(self, *, oldest_version: int = 0, after_id: int = 0) -> Rows:
        """Rows of at least that oldest version and above that id whose payload is held, by id."""
        if oldest_version <= 0:
            return self._rows("WHERE id > ? AND evicted_s IS NULL ORDER BY id", after_id)
        # By the index of what is held: with the default order of things SQLite would read the whole table.
        found = self._rows(
            "INDEXED BY groups_held WHERE oldest_version >= ? AND id > ? AND evicted_s IS NULL",
            oldest_version,
            after_id,
        )
        return found[np.argsort(found["id"])]

    def oldest_held(self, *, limit: int, after: tuple[int, int] = (-1, 0)) -> Rows:
        """Up to ``limit`` rows whose payload is held, by (oldest version, id), from behind the pair ``after`` on."""
        return self._rows(
            "INDEXED BY groups_held WHERE (oldest_version, id) > (?, ?) AND evicted_s IS NULL "
            "ORDER BY oldest_version, id LIMIT ?",
            *after,
            limit,
        )

    def epochs(self) -> dict[int, int]:
        """Epoch → number of its prompts that are answered here, evicted ones included."""
        return dict(self._db.rows("SELECT epoch, COUNT(*) FROM groups GROUP BY epoch ORDER BY epoch"))

    def answered(self, epoch: int) -> np.ndarray:
        """int64 ``[n]``: the prompts of ``epoch`` that are answered here, ascending, evicted ones included."""
        indices = self._db.column("SELECT prompt_index FROM groups WHERE epoch = ? ORDER BY prompt_index", epoch)
        return np.array(indices, dtype=np.int64)

    def find(self, keys: Iterable[str]) -> Rows:
        """The rows of those keys that are there, evicted ones included, in the order of the keys."""
        found = [self._rows("WHERE key = ?", key) for key in keys]
        return np.concatenate([np.zeros(0, ROW), *found])

    def read(self, group_ids: Sequence[int]) -> tuple[list[bytes | None], dict[int, str]]:
        """Payloads in the order of the ids, None for one that cannot be had, and why: id → one sentence."""
        payloads: list[bytes | None] = []
        problems: dict[int, str] = {}
        for group_id in group_ids:
            payload, problem = self._read_one(group_id)
            payloads.append(payload)
            if payload is None:
                problems[group_id] = problem
        return payloads, problems

    def evict(self, group_ids: Sequence[int]) -> tuple[int, int]:
        """Drop payloads; returns how many, and their bytes. Rows stay; what is evicted or unknown counts nothing."""
        freed: dict[int, int] = {}
        # Broken pages cannot be given back, and meeting them spoils a whole transaction. The group's row must still be
        # marked, or eviction would stop at it for good.
        sound = {group_id for group_id in group_ids if self._can_be_dropped(group_id)}
        with self._db.transaction():
            for group_id in group_ids:
                held = self._db.column("SELECT num_bytes FROM groups WHERE id = ? AND evicted_s IS NULL", group_id)
                if held:
                    if group_id in sound:
                        self._db.execute("DELETE FROM payloads WHERE group_id = ?", (group_id,))
                    self._db.execute("UPDATE groups SET evicted_s = ? WHERE id = ?", (time.time(), group_id))
                    freed[group_id] = held[0]
        self._counts["held_groups"] -= len(freed)
        self._counts["held_bytes"] -= sum(freed.values())
        return len(freed), sum(freed.values())

    def held(self) -> tuple[int, int]:
        """Groups whose payload is held, and the bytes of these payloads."""
        if self._db.read_only:
            self._count()
        return self._counts["held_groups"], self._counts["held_bytes"]

    def stats(self) -> dict[str, Any]:
        """Counts over everything ever stored, and ``file_bytes``. The writer has them in memory.

        ``verdicts``: number of verdicts → groups; ``equal_verdicts``: the same, of groups whose verdicts do not differ.
        """
        if self._db.read_only:
            self._count()
        counts = dict(self._counts)
        outcomes = {outcome.value: counts.pop(outcome.value) for outcome in Outcome}
        evicted = counts["groups"] - counts["held_groups"]
        return {
            **counts,
            "outcomes": outcomes,
            "verdicts": dict(self._verdicts),
            "equal_verdicts": dict(self._equal),
            "evicted": evicted,
            "file_bytes": self._db.file_bytes(),
        }

    def verify(self) -> Iterator[str]:
        """Read everything and yield one sentence per problem; nothing if the shard is sound."""
        try:
            yield from self._db.problems()
            names = ("id", "evicted_s", *GROUP_COLUMNS)
            query = f"SELECT {', '.join(names)} FROM groups WHERE id > ? ORDER BY id LIMIT {_CHUNK}"
            last = 0
            while chunk := self._db.rows(query, last):
                last = chunk[-1][0]
                for row in chunk:
                    yield from self._verify_group(row[0], row[1], dict(zip(names[2:], row[2:], strict=True)))
        except ReplayError as error:
            yield f"{error} (what comes after it was not looked at)"

    def _verify_group(self, group_id: int, evicted_s: float | None, row: dict[str, Any]) -> Iterator[str]:
        about = f"{self.path}: group {group_id} ({row['key']})"
        if shard_of_id(group_id, self.shards) != self.shard:
            yield f"{about} has the id of a group of shard {shard_of_id(group_id, self.shards)}"
        if evicted_s is not None:
            if self._db.rows("SELECT 1 FROM payloads WHERE group_id = ?", group_id):
                yield f"{about} is marked as evicted, but its payload is there"
            return
        payload, problem = self._read_one(group_id)
        if payload is None:
            # Beside a writer it may have been evicted since its row was read.
            if not self._db.column("SELECT 1 FROM groups WHERE id = ? AND evicted_s IS NOT NULL", group_id):
                yield problem
            return
        try:
            group = decode(payload)
            columns = group_columns(group) | {"num_bytes": len(payload)}
        except (ValueError, LookupError) as error:
            yield f"{about} cannot be decoded: {error}"
            return
        if shard_of_key(group.key, self.shards) != self.shard:
            yield f"{about} belongs to shard {shard_of_key(group.key, self.shards)} by its key"
        wrong = [name for name in GROUP_COLUMNS if columns[name] != row[name]]
        if wrong:
            yield f"{about}: {', '.join(wrong)} contradict its payload"

    def _read_one(self, group_id: int) -> tuple[bytes | None, str]:
        """The payload and an empty sentence, or None and the reason."""
        about = f"{self.path}: group {group_id}"
        try:
            found = self._db.rows("SELECT payload, checksum FROM payloads WHERE group_id = ?", group_id)
            if not found:
                evicted = self._db.column("SELECT evicted_s IS NOT NULL FROM groups WHERE id = ?", group_id)
                if not evicted:
                    return None, f"{about} is unknown"
                return None, f"{about} was evicted" if evicted[0] else f"{about} is damaged: its payload is missing"
        except DamagedFile as error:
            return None, f"{about} is damaged: {error.__cause__}"
        payload, checksum = found[0]
        # A damaged column may also come back as another type.
        if not isinstance(payload, bytes) or xxhash.xxh3_128_hexdigest(payload) != checksum:
            return None, f"{about} is damaged: the bytes of its payload do not match their checksum"
        return payload, ""

    def _can_be_dropped(self, group_id: int) -> bool:
        """False if the payload's pages are broken; walks them, since the column lies behind the payload."""
        try:
            return bool(self._db.rows("SELECT checksum FROM payloads WHERE group_id = ?", group_id))
        except DamagedFile:
            return False

    def _rows(self, where: str, *values: Any) -> Rows:
        """Rows of the table by a WHERE clause, in its order; read one by one into the array."""
        cursor = self._db.execute(f"SELECT {_ROW_COLUMNS} FROM groups {where}", values)
        try:
            with clear_errors(self.path):
                return np.fromiter(cursor, dtype=ROW)
        except (TypeError, ValueError) as error:
            raise DamagedFile(f"replay store {self.path}: a row of table groups is damaged ({error})") from error

    def _count(self) -> None:
        """Count everything anew."""
        sums = ", ".join(_COUNTS.values())
        found = self._db.rows(
            f"SELECT {sums}, num_with_reward, SUM(NOT has_signal) FROM groups GROUP BY num_with_reward"
        )
        self._counts = {name: sum(row[i] for row in found) for i, name in enumerate(_COUNTS)}
        self._verdicts = Counter({row[-2]: row[0] for row in found})
        self._equal = Counter({row[-2]: row[-1] for row in found})

    def _count_new(self, columns: Sequence[dict[str, Any]]) -> None:
        """What ``_count`` would say after these groups."""
        for group in columns:
            self._counts["groups"] += 1
            self._counts["trajectories"] += group["num_trajectories"]
            self._counts["sampled_tokens"] += group["num_sampled_tokens"]
            for outcome in Outcome:
                self._counts[outcome.value] += group[f"num_{outcome.value}"]
            self._counts["held_groups"] += 1
            self._counts["held_bytes"] += group["num_bytes"]
            self._verdicts[group["num_with_reward"]] += 1
            self._equal[group["num_with_reward"]] += not group["has_signal"]

    def _first_free_id(self) -> int:
        newest = self._db.one("SELECT MAX(id) FROM groups")
        return self.shard + 1 if newest is None else newest + self.shards

    def _check_place(self) -> None:
        found = (int(self._db.meta("shard") or 0), int(self._db.meta("shards") or 1))
        if found != (self.shard, self.shards):
            raise ValueError(
                f"replay store {self.path} is shard {found[0]} of {found[1]}, not shard {self.shard} of {self.shards}: "
                f"open it with replay.shards={found[1]}, or start a new run"
            )


def _note_place(connection: sqlite3.Connection, shard: int, shards: int) -> None:
    connection.executemany(
        "INSERT INTO meta (key, value) VALUES (?, ?)", [("shard", str(shard)), ("shards", str(shards))]
    )
