"""The tables of a store. A file of another schema version is refused, never guessed at."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

from r2vpo.records import Outcome, TrajectoryGroup
from replay.errors import ReplayError
from replay.serialize import parse_key

SCHEMA_VERSION = 1
"""Version of the tables; it changes whenever a statement below does."""

_STATEMENTS = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE groups (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        epoch INTEGER NOT NULL,
        prompt_index INTEGER NOT NULL,
        worker TEXT NOT NULL,
        lease_version INTEGER NOT NULL,
        oldest_version INTEGER NOT NULL,
        newest_version INTEGER NOT NULL,
        num_trajectories INTEGER NOT NULL,
        num_tokens INTEGER NOT NULL,
        num_sampled_tokens INTEGER NOT NULL,
        num_with_reward INTEGER NOT NULL,
        has_signal INTEGER NOT NULL,
        reward_mean REAL,
        num_scored INTEGER NOT NULL,
        num_truncated INTEGER NOT NULL,
        num_no_verdict INTEGER NOT NULL,
        num_timeout INTEGER NOT NULL,
        num_error INTEGER NOT NULL,
        unusable TEXT,
        appended_s REAL NOT NULL
    )""",
    "CREATE INDEX groups_by_oldest_version ON groups (oldest_version, id)",
    """CREATE TABLE payloads (
        group_id INTEGER PRIMARY KEY REFERENCES groups (id),
        payload BLOB NOT NULL,
        checksum TEXT NOT NULL
    )""",
    "CREATE TABLE steps (step INTEGER PRIMARY KEY, committed_s REAL NOT NULL)",
    """CREATE TABLE consumption (
        step INTEGER NOT NULL REFERENCES steps (step),
        group_id INTEGER NOT NULL REFERENCES groups (id),
        kind TEXT NOT NULL,
        position INTEGER NOT NULL,
        PRIMARY KEY (step, group_id)
    )""",
    "CREATE INDEX consumption_by_group ON consumption (group_id, step)",
    """CREATE TABLE choice (
        position INTEGER PRIMARY KEY,
        step INTEGER NOT NULL,
        group_id INTEGER NOT NULL UNIQUE REFERENCES groups (id),
        kind TEXT NOT NULL
    )""",
)


def create_or_check(db: sqlite3.Connection, path: Path, *, may_create: bool) -> None:
    """Create the tables in an empty file, or check that it is a store of this schema. ``ReplayError`` if not."""
    tables = {row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables and may_create:
        db.execute("BEGIN IMMEDIATE")  # one transaction: a crash leaves an empty file, not half a schema
        for statement in _STATEMENTS:
            db.execute(statement)
        db.execute("INSERT INTO meta (key, value) VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),))
        db.execute("COMMIT")
        return
    if not {"meta", "groups"} <= tables:
        raise ReplayError(f"{path} is not a replay store")
    found = db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    if found is None or found[0] != str(SCHEMA_VERSION):
        raise ReplayError(
            f"replay store {path} has schema version {found and found[0]}, this version of r2vpo reads "
            f"{SCHEMA_VERSION}: open it with the version that wrote it, or start a new run"
        )


def group_columns(group: TrajectoryGroup) -> dict[str, Any]:
    """What the table says about a group, all of it derived from the group."""
    epoch, index = parse_key(group.key)
    verdicts = [float(t.reward) for t in group.trajectories if t.reward is not None]
    return {
        "key": group.key,
        "epoch": epoch,
        "prompt_index": index,
        "worker": group.worker,
        "lease_version": group.lease_version,
        "oldest_version": group.oldest_version,
        "newest_version": group.newest_version,
        "num_trajectories": len(group.trajectories),
        "num_tokens": group.num_tokens,
        "num_sampled_tokens": group.num_sampled_tokens,
        "num_with_reward": group.num_scored,
        "has_signal": int(group.has_signal),
        "reward_mean": float(np.mean(verdicts)) if verdicts else None,
        **{f"num_{o.value}": sum(t.outcome is o for t in group.trajectories) for o in Outcome},
    }
