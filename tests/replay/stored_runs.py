"""Stores on disk for the tests of what reads them."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from r2vpo.records import BatchPlan, Draw, Kind, TrajectoryGroup, prompt_key
from replay.consumption import ConsumptionLog
from replay.rows import encode_group, shard_of_key
from replay.schema import CONSUMPTION_FILE, shard_file
from replay.shard import ShardStore


class StoredRun:
    """The writers of a run's store in one object. A context manager."""

    def __init__(self, directory: Path, *, shards: int = 1) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.log = ConsumptionLog(directory / CONSUMPTION_FILE, shards=shards)
        self.stores = [ShardStore(directory / shard_file(s), shard=s, shards=shards) for s in range(shards)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for store in self.stores:
            store.close()
        self.log.close()

    def append(self, *groups: TrajectoryGroup) -> list[int]:
        """Ids of the groups."""
        ids = []
        for group in groups:
            rows, _ = self.stores[shard_of_key(group.key, self.log.shards)].append_many([encode_group(group)])
            ids.append(int(rows[0]["id"]))
        return ids

    def choose(self, step: int, *, fresh: Sequence[int] = (), stale: Sequence[int] = ()) -> None:
        uses = dict(self.log.uses().tolist())
        draws = [Draw(group_id=i, kind=Kind.FRESH, uses=uses.get(i, 0)) for i in fresh]
        draws += [Draw(group_id=i, kind=Kind.STALE, uses=uses.get(i, 0)) for i in stale]
        self.log.choose(BatchPlan(step=step, draws=tuple(draws)))

    def train(self, step: int, *, fresh: Sequence[int] = (), stale: Sequence[int] = ()) -> None:
        self.choose(step, fresh=fresh, stale=stale)
        self.log.commit(step=step, group_ids=[*fresh, *stale])

    def evict(self, group_id: int) -> None:
        self.stores[(group_id - 1) % self.log.shards].evict([group_id])


def keys_of_shard(shard: int, shards: int, count: int) -> list[str]:
    """The first ``count`` keys of epoch 0 that belong to the shard."""
    keys = (prompt_key(0, index) for index in range(10_000))
    return [key for key in keys if shard_of_key(key, shards) == shard][:count]


def tamper(file: Path, sql: str, *values: object) -> None:
    """Change a closed file of a store behind its back."""
    connection = sqlite3.connect(file)
    with connection:
        connection.execute("PRAGMA foreign_keys = OFF")
        connection.execute(sql, values)
    connection.close()
