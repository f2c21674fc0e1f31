"""From one schema version to the next, in place. Each step is a function in a table below: the next one goes there.

Version 1 was one file, ``shard-000.sqlite3``, which also held what is in the consumption log now:

    shard-000 (1): groups, payloads, steps, consumption, choice   ──▶   shard-000 (2): groups, payloads
                                                                  ──▶   consumption (2): steps, consumption, choice, …

The log is made first, complete or not at all; only a shard beside such a log drops its own tables. Whoever opens
either file goes on where a crash left it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

from replay.database import Migration, create, schema_version_of
from replay.errors import ReplayError
from replay.schema import CONSUMPTION_FILE, CONSUMPTION_TABLES, SCHEMA_VERSION, SHARD_TABLES, group_columns, shard_file
from replay.serialize import decode

_KEPT = (
    "id, key, epoch, prompt_index, worker, lease_version, oldest_version, newest_version, num_trajectories, num_tokens,"
    " num_sampled_tokens, num_with_reward, has_signal, reward_mean, num_scored, num_truncated, num_no_verdict,"
    " num_timeout, num_error, appended_s"
)


def version_1_beside(log: Path) -> Path | None:
    """The shard of schema version 1 whose steps and consumption belong into ``log``, which is missing; or None."""
    shard = log.with_name(shard_file(0))
    return shard if shard.exists() and not log.exists() and schema_version_of(shard) == 1 else None


def fill_from_version_1(log: sqlite3.Connection, shard: sqlite3.Connection) -> None:
    """Put what ``shard`` (version 1) knows of steps and consumption into the empty tables of ``log``."""
    _note(log, {"shards": "1"})
    log.executemany("INSERT INTO steps (step, committed_s) VALUES (?, ?)", shard.execute("SELECT * FROM steps"))
    log.executemany(
        "INSERT INTO consumption (step, group_id, kind, position, uses, weight) VALUES (?, ?, ?, ?, ?, 1.0)",
        shard.execute(
            "SELECT step, group_id, kind, position, ROW_NUMBER() OVER (PARTITION BY group_id ORDER BY step) - 1 "
            "FROM consumption"
        ),
    )
    log.executemany(
        "INSERT INTO choice (position, step, group_id, kind, uses, weight) VALUES (?, ?, ?, ?, ?, 1.0)",
        shard.execute(
            "SELECT position, step, group_id, kind, "
            "(SELECT COUNT(*) FROM consumption c WHERE c.group_id = choice.group_id) FROM choice"
        ),
    )
    log.executemany(
        "INSERT INTO set_aside (group_id, reason) VALUES (?, ?)",
        shard.execute("SELECT id, unusable FROM groups WHERE unusable IN ('late', 'ahead')"),
    )


def _shard_1_to_2(shard: sqlite3.Connection, path: Path) -> None:
    log = path.with_name(CONSUMPTION_FILE)
    if not log.exists():
        create(
            log,
            tables=CONSUMPTION_TABLES,
            schema_version=SCHEMA_VERSION,
            fill=lambda connection: fill_from_version_1(connection, shard),
        )
    for table in ("choice", "consumption", "steps"):
        shard.execute(f"DROP TABLE {table}")
    shard.execute("DROP INDEX groups_by_oldest_version")
    groups = next(statement for statement in SHARD_TABLES if statement.startswith("CREATE TABLE groups "))
    shard.execute(groups.replace("CREATE TABLE groups ", "CREATE TABLE groups_2 ", 1))
    shard.execute(
        f"INSERT INTO groups_2 ({_KEPT}, reward_spread, num_bytes) SELECT {_KEPT}, 0.0, "
        "COALESCE((SELECT LENGTH(payload) FROM payloads WHERE group_id = groups.id), 0) FROM groups"
    )
    for (group_id,) in shard.execute("SELECT id FROM groups").fetchall():
        spread = _reward_spread(shard, group_id)
        shard.execute("UPDATE groups_2 SET reward_spread = ? WHERE id = ?", (spread, group_id))
    shard.execute("DROP TABLE groups")
    shard.execute("ALTER TABLE groups_2 RENAME TO groups")
    for statement in SHARD_TABLES:
        if statement.startswith("CREATE INDEX"):
            shard.execute(statement)
    _note(shard, {"shard": "0", "shards": "1", "state": "closed"})


def _reward_spread(shard: sqlite3.Connection, group_id: int) -> float:
    """Of the stored group; 0 if it is damaged, which is found, and said, when it is read."""
    try:
        found = shard.execute("SELECT payload FROM payloads WHERE group_id = ?", (group_id,)).fetchone()
        return group_columns(decode(found[0]))["reward_spread"] if found else 0.0
    except (sqlite3.DatabaseError, ReplayError, ValueError, LookupError):
        return 0.0


def _note(connection: sqlite3.Connection, about: Mapping[str, str]) -> None:
    connection.executemany("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", about.items())


SHARD_MIGRATIONS: Mapping[int, Migration] = {1: _shard_1_to_2}
"""Schema version of a shard → the step to the next one."""
CONSUMPTION_MIGRATIONS: Mapping[int, Migration] = {}
"""The same for a consumption log; there was none before version 2."""
