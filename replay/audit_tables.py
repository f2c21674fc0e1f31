"""What the audit reads: the tables of a run's store as arrays, by plain SQL, from one snapshot of all files.

The log's snapshot is taken first: what was consumed then is in the shards now, also while the run goes on. Snapshots
are let go of as soon as the tables are read, so that no writer's log grows meanwhile; payloads are read one by one.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from replay.database import clear_errors, reading
from replay.errors import ReplayError
from replay.schema import CONSUMPTION_FILE, SCHEMA_VERSION, shard_file

GROUP = np.dtype(
    [
        ("id", np.int64),
        ("epoch", np.int64),
        ("prompt_index", np.int64),
        ("lease_version", np.int64),
        ("oldest_version", np.int64),
        ("newest_version", np.int64),
        ("num_trajectories", np.int64),
        ("num_tokens", np.int64),
        ("num_sampled_tokens", np.int64),
        ("num_with_reward", np.int64),
        ("has_signal", np.bool_),
        ("num_bytes", np.int64),
        ("evicted_s", np.float64),  # NaN while the payload is held
    ]
)
"""A row of table ``groups``, names as there."""
USE = np.dtype(
    [
        ("step", np.int64),
        ("group_id", np.int64),
        ("is_fresh", np.bool_),
        ("position", np.int64),
        ("uses", np.int64),
        ("weight", np.float64),
    ]
)
"""A row of table ``consumption``, or of ``choice``."""


@dataclass(frozen=True, kw_only=True)
class LogTables:
    """The consumption log."""

    shards: int
    hosts: Mapping[int, str]
    steps: np.ndarray
    """int64 ``[n]``: committed steps, ascending."""
    committed_s: np.ndarray
    """float64 ``[n]``: when each was committed (Unix seconds)."""
    consumption: np.ndarray
    """``USE [n]``, by step and position."""
    choice: np.ndarray
    """``USE [n]``: the batch in work."""
    aside: Mapping[int, str]

    @property
    def version(self) -> int:
        """Number of the next learner step."""
        return int(self.steps.max(initial=-1)) + 1


@dataclass(frozen=True, kw_only=True)
class ShardTables:
    """One shard."""

    path: Path
    place: tuple[int, int]
    """Number of the shard and of all shards, as the file notes them."""
    keys: Sequence[str]
    """The key of each group."""
    groups: np.ndarray
    """``GROUP [n]``, ascending ids."""
    orphans: Sequence[int]
    """Ids of payloads without a group."""


@dataclass(frozen=True, kw_only=True)
class StoreTables:
    """All files of a store that are here."""

    log: LogTables
    shards: Mapping[int, ShardTables]
    missing: Mapping[int, str] = field(default_factory=dict)
    """Shards whose files are not here: number → host, empty where it is not known."""
    unreadable: Mapping[int, str] = field(default_factory=dict)
    """Shards that cannot be read: number → sentence."""


def read_tables(directory: Path) -> StoreTables:
    """The tables of the store in ``directory``. ``ReplayError`` if there is no log, or it cannot be read."""
    log_path = directory / CONSUMPTION_FILE
    if not log_path.is_file():
        raise ReplayError(f"{directory} holds no replay store: {CONSUMPTION_FILE} is missing")
    with ExitStack() as opened:
        log_db = _snapshot(log_path, opened)
        shards, hosts = _about_log(log_db)
        databases: dict[int, sqlite3.Connection] = {}
        missing: dict[int, str] = {}
        unreadable: dict[int, str] = {}
        for shard in range(shards):
            path = directory / shard_file(shard)
            try:
                if path.is_file():
                    databases[shard] = _snapshot(path, opened)
                else:
                    missing[shard] = hosts.get(shard, "")
            except ReplayError as error:
                unreadable[shard] = str(error)
        log = _read_log(log_path, log_db, shards, hosts)
        tables: dict[int, ShardTables] = {}
        for shard, database in databases.items():
            try:
                tables[shard] = _read_shard(directory / shard_file(shard), database)
            except ReplayError as error:
                unreadable[shard] = str(error)
    return StoreTables(log=log, shards=tables, missing=missing, unreadable=unreadable)


def _snapshot(path: Path, opened: ExitStack) -> sqlite3.Connection:
    """A connection that sees the file as it is now until ``opened`` ends."""
    database = opened.enter_context(reading(path))
    with clear_errors(path):
        database.execute("BEGIN")
        found = dict(database.execute("SELECT key, value FROM meta"))
    if found.get("schema_version") != str(SCHEMA_VERSION):
        raise ReplayError(
            f"replay store {path} has schema version {found.get('schema_version')}, this version of r2vpo reads "
            f"{SCHEMA_VERSION}; `r2vpo train` with --resume migrates an older one"
        )
    return database


def _about_log(database: sqlite3.Connection) -> tuple[int, dict[int, str]]:
    about = dict(database.execute("SELECT key, value FROM meta"))
    hosts = json.loads(about.get("hosts", "{}"))
    return int(about.get("shards", "1")), {int(shard): host for shard, host in hosts.items()}


def _read_log(path: Path, database: sqlite3.Connection, shards: int, hosts: Mapping[int, str]) -> LogTables:
    columns = "step, group_id, kind = 'fresh', position, uses, weight"
    with clear_errors(path):
        return LogTables(
            shards=shards,
            hosts=hosts,
            steps=_column(path, database, "SELECT step FROM steps ORDER BY step", np.int64),
            committed_s=_column(path, database, "SELECT committed_s FROM steps ORDER BY step", np.float64),
            consumption=_array(path, database, f"SELECT {columns} FROM consumption ORDER BY step, position", USE),
            choice=_array(path, database, f"SELECT {columns} FROM choice ORDER BY position", USE),
            aside=dict(database.execute("SELECT group_id, reason FROM set_aside ORDER BY group_id")),
        )


def _read_shard(path: Path, database: sqlite3.Connection) -> ShardTables:
    with clear_errors(path):
        about = dict(database.execute("SELECT key, value FROM meta"))
        names = ", ".join(GROUP.names or ())
        return ShardTables(
            path=path,
            place=(int(about.get("shard", "0")), int(about.get("shards", "1"))),
            keys=[row[0] for row in database.execute("SELECT key FROM groups NOT INDEXED ORDER BY id")],
            groups=_array(path, database, f"SELECT {names} FROM groups NOT INDEXED ORDER BY id", GROUP),
            orphans=[
                row[0]
                for row in database.execute(
                    "SELECT group_id FROM payloads WHERE group_id NOT IN (SELECT id FROM groups) ORDER BY group_id"
                )
            ],
        )


def _column(path: Path, database: sqlite3.Connection, query: str, dtype: type[np.generic]) -> np.ndarray:
    try:
        return np.fromiter((row[0] for row in database.execute(query)), dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ReplayError(f"replay store {path}: a row of `{query}` is damaged ({error})") from error


def _array(path: Path, database: sqlite3.Connection, query: str, dtype: np.dtype[Any]) -> np.ndarray:
    """The rows of a query, read one by one into the array; NULL is NaN in a float column."""
    floats = [dtype[name].kind == "f" for name in dtype.names or ()]
    rows = database.execute(query)
    filled = (tuple(np.nan if v is None and f else v for v, f in zip(row, floats, strict=True)) for row in rows)
    try:
        return np.fromiter(filled, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ReplayError(f"replay store {path}: a row of `{query}` is damaged ({error})") from error
