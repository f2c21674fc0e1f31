"""What the service knows of stored groups: columns, one numpy record per group, so that a million fit in memory.

A group's id names its shard: ``id = local * shards + shard + 1``, local = 0, 1, … in order of arrival.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from r2vpo.records import TrajectoryGroup
from replay.schema import group_columns
from replay.serialize import encode, parse_key

ROW = np.dtype(
    [
        ("id", np.int64),
        ("epoch", np.int64),
        ("prompt_index", np.int64),
        ("oldest_version", np.int64),
        ("newest_version", np.int64),
        ("num_with_reward", np.int32),
        ("has_signal", np.bool_),
        ("reward_spread", np.float64),  # mean |reward - group mean| over the verdicts
        ("num_bytes", np.int64),  # of the payload
    ]
)
"""One stored group. Names are those of the table ``groups``."""

Rows = np.ndarray
"""A one-dimensional array of ``ROW``."""


@dataclass(frozen=True, kw_only=True)
class EncodedGroup:
    """A group ready to be stored: made where the group was born, so that a shard only writes."""

    key: str
    columns: dict[str, Any]
    """The derived columns of table ``groups``."""
    payload: bytes
    """The group as `serialize.encode` writes it."""
    checksum: str
    """xxh3-128 of the payload, hexadecimal."""


def encode_group(group: TrajectoryGroup) -> EncodedGroup:
    """``ValueError`` for a malformed group."""
    payload = encode(group)
    return EncodedGroup(
        key=group.key,
        columns=group_columns(group) | {"num_bytes": len(payload)},
        payload=payload,
        checksum=xxhash.xxh3_128_hexdigest(payload),
    )


def shard_of_key(key: str, shards: int) -> int:
    """The shard that holds ``key``: by hash, the same in every process and on every machine."""
    parse_key(key)
    return xxhash.xxh3_64_intdigest(key.encode()) % shards


def shard_of_id(group_id: int, shards: int) -> int:
    """The shard that holds the group."""
    return (group_id - 1) % shards


def by_shard(group_ids: Sequence[int], shards: int) -> dict[int, list[int]]:
    """Ids by the shard that holds them, in the order given."""
    split: dict[int, list[int]] = {}
    for group_id in group_ids:
        split.setdefault(shard_of_id(group_id, shards), []).append(group_id)
    return split
