"""The tables of a store: one file per shard for groups and payloads, one file for what became of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from r2vpo.records import Outcome, TrajectoryGroup
from replay.serialize import parse_key

SCHEMA_VERSION = 2
"""Version of the tables of both files; it changes whenever a statement below does (see `migration`)."""

CONSUMPTION_FILE = "consumption.sqlite3"
"""Name of the consumption log in the replay directory of a run."""


def shard_file(shard: int) -> str:
    """Name of a shard's file: ``shard_file(0) == "shard-000.sqlite3"``."""
    return f"shard-{shard:03d}.sqlite3"


SHARD_TABLES = (
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
        reward_spread REAL NOT NULL,
        num_scored INTEGER NOT NULL,
        num_truncated INTEGER NOT NULL,
        num_no_verdict INTEGER NOT NULL,
        num_timeout INTEGER NOT NULL,
        num_error INTEGER NOT NULL,
        num_bytes INTEGER NOT NULL,
        appended_s REAL NOT NULL,
        evicted_s REAL
    )""",
    "CREATE INDEX groups_held ON groups (oldest_version, id) WHERE evicted_s IS NULL",
    "CREATE INDEX groups_by_epoch ON groups (epoch, prompt_index)",
    """CREATE TABLE payloads (
        group_id INTEGER PRIMARY KEY REFERENCES groups (id),
        payload BLOB NOT NULL,
        checksum TEXT NOT NULL
    )""",
)
CONSUMPTION_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE steps (step INTEGER PRIMARY KEY, committed_s REAL NOT NULL)",
    """CREATE TABLE consumption (
        step INTEGER NOT NULL REFERENCES steps (step),
        group_id INTEGER NOT NULL,
        kind TEXT NOT NULL,
        position INTEGER NOT NULL,
        uses INTEGER NOT NULL,
        weight REAL NOT NULL,
        PRIMARY KEY (step, group_id)
    )""",
    "CREATE INDEX consumption_by_group ON consumption (group_id, step)",
    """CREATE TABLE choice (
        position INTEGER PRIMARY KEY,
        step INTEGER NOT NULL,
        group_id INTEGER NOT NULL UNIQUE,
        kind TEXT NOT NULL,
        uses INTEGER NOT NULL,
        weight REAL NOT NULL
    )""",
    "CREATE TABLE set_aside (group_id INTEGER PRIMARY KEY, reason TEXT NOT NULL)",
)


GROUP_COLUMNS = (
    "key",
    "epoch",
    "prompt_index",
    "worker",
    "lease_version",
    "oldest_version",
    "newest_version",
    "num_trajectories",
    "num_tokens",
    "num_sampled_tokens",
    "num_with_reward",
    "has_signal",
    "reward_mean",
    "reward_spread",
    *(f"num_{outcome.value}" for outcome in Outcome),
    "num_bytes",
)
"""What table ``groups`` says about a group that follows from its payload."""


def group_columns(group: TrajectoryGroup) -> dict[str, Any]:
    """``GROUP_COLUMNS`` of a group, but for ``num_bytes``, the length of its payload."""
    epoch, index = parse_key(group.key)
    verdicts = np.array([float(t.reward) for t in group.trajectories if t.reward is not None])
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
        "reward_mean": float(verdicts.mean()) if len(verdicts) else None,
        "reward_spread": float(np.abs(verdicts - verdicts.mean()).mean()) if len(verdicts) >= 2 else 0.0,
        **{f"num_{o.value}": sum(t.outcome is o for t in group.trajectories) for o in Outcome},
    }
