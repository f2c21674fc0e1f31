"""The store as one Parquet file, a row per trajectory, for notebooks and query engines.

Groups are read and written a row group at a time, so that memory does not grow with the store. The file appears under
its name once it is complete. pyarrow is imported when something is exported.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from r2vpo.records import Trajectory
from replay.reader import StoredGroup, StoreReader
from replay.rows import shard_of_id

if TYPE_CHECKING:
    import pyarrow as pa

ROW_GROUP_ROWS = 4096
ROW_GROUP_TOKENS = 1 << 20
"""A row group ends at whichever comes first: 2^20 tokens with all their columns take 13 MB."""


@dataclass(kw_only=True)
class Exported:
    """What an export came to."""

    groups: int = 0
    trajectories: int = 0
    evicted: int = 0
    """Groups left out: their payloads are gone."""
    problems: list[str] = field(default_factory=list)
    """One sentence for each group left out because it could not be read."""


def export_parquet(
    reader: StoreReader,
    path: Path,
    *,
    tokens: bool = False,
    overwrite: bool = False,
    row_group_rows: int = ROW_GROUP_ROWS,
) -> Exported:
    """Write all groups whose payloads are held to ``path``; evicted and unreadable ones are left out and counted.

    Args:
        reader: the store.
        path: the file; its folder must exist.
        tokens: with the per-token lists ``token_ids``, ``loss_mask``, ``behavior_logprob`` and ``version``.
        overwrite: replace a file of that name.
        row_group_rows: most trajectories in a row group, and in memory beside one group.

    ``FileExistsError`` without ``overwrite``, ``OSError`` if the file cannot be written.
    """
    import pyarrow.parquet as pq

    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists")
    done = Exported()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            with pq.ParquetWriter(file, _schema(tokens=tokens), compression="zstd") as writer:
                for rows in _row_groups(_readable(reader, done), row_group_rows):
                    writer.write_table(_table(rows, reader.shards, tokens=tokens))
                    done.trajectories += len(rows)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    return done


def _readable(reader: StoreReader, done: Exported) -> Iterator[tuple[StoredGroup, int]]:
    """Group and member of every trajectory that can be read; ``done`` counts along."""
    for stored in reader.groups():
        if stored.group is not None:
            done.groups += 1
            yield from ((stored, member) for member in range(len(stored.group.trajectories)))
        elif stored.info.evicted_s is not None:
            done.evicted += 1
        else:
            done.problems.append(stored.problem)


def _row_groups(
    rows: Iterable[tuple[StoredGroup, int]], row_group_rows: int
) -> Iterator[list[tuple[StoredGroup, int]]]:
    batch: list[tuple[StoredGroup, int]] = []
    tokens = 0
    for row in rows:
        batch.append(row)
        tokens += _trajectory(row).num_tokens
        if len(batch) >= row_group_rows or tokens >= ROW_GROUP_TOKENS:
            yield batch
            batch, tokens = [], 0
    if batch:
        yield batch


def _schema(*, tokens: bool) -> pa.Schema:
    import pyarrow as pa

    columns = {
        "group_id": pa.int64(),
        "key": pa.string(),
        "epoch": pa.int64(),
        "prompt_index": pa.int64(),
        "shard": pa.int32(),
        "member": pa.int32(),
        "prompt": pa.string(),
        "truth": pa.string(),
        "response": pa.string(),
        "reward": pa.float64(),
        "outcome": pa.string(),
        "oldest_version": pa.int64(),
        "newest_version": pa.int64(),
        "worker": pa.string(),
        "uses": pa.int32(),
        "trained_steps": pa.list_(pa.int64()),
        "num_tokens": pa.int32(),
        "num_sampled_tokens": pa.int32(),
    }
    if tokens:
        columns |= {
            "token_ids": pa.list_(pa.int32()),
            "loss_mask": pa.list_(pa.bool_()),
            "behavior_logprob": pa.list_(pa.float32()),
            "version": pa.list_(pa.int32()),
        }
    return pa.schema(list(columns.items()))


def _table(rows: Sequence[tuple[StoredGroup, int]], shards: int, *, tokens: bool) -> pa.Table:
    import pyarrow as pa

    schema = _schema(tokens=tokens)
    plain = [_plain(stored, member, shards) for stored, member in rows]
    columns: dict[str, Any] = {
        name: pa.array([row[name] for row in plain], schema.field(name).type) for name in plain[0]
    }
    if tokens:
        members = [_trajectory(row) for row in rows]
        columns |= {
            "token_ids": _lists([t.token_ids_T for t in members]),
            "loss_mask": _lists([t.loss_mask_T for t in members]),
            "behavior_logprob": _lists([t.behavior_logprob_T for t in members]),
            "version": _lists([t.version_T for t in members]),
        }
    return pa.table(columns, schema=schema)


def _plain(stored: StoredGroup, member: int, shards: int) -> dict[str, Any]:
    """The columns of one trajectory, per-token lists apart. Its versions are its own, not the group's."""
    info, trajectory = stored.info, _trajectory((stored, member))
    assert stored.group is not None
    sampled = trajectory.num_trained_tokens
    return {
        "group_id": info.id,
        "key": info.key,
        "epoch": info.epoch,
        "prompt_index": info.prompt_index,
        "shard": shard_of_id(info.id, shards),
        "member": member,
        "prompt": _storable(stored.group.prompt),
        "truth": json.dumps(stored.group.truth),
        "response": _storable(trajectory.response),
        "reward": trajectory.reward,
        "outcome": trajectory.outcome.value,
        "oldest_version": trajectory.oldest_version if sampled else None,
        "newest_version": trajectory.newest_version if sampled else None,
        "worker": info.worker,
        "uses": len(info.trained),
        "trained_steps": [step for step, _ in info.trained],
        "num_tokens": trajectory.num_tokens,
        "num_sampled_tokens": sampled,
    }


def _trajectory(row: tuple[StoredGroup, int]) -> Trajectory:
    stored, member = row
    assert stored.group is not None
    return stored.group.trajectories[member]


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    """One list per array, without a Python object per element."""
    import pyarrow as pa

    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(arrays)))


def _storable(text: str) -> str:
    """UTF-8 has no lone surrogates, which a byte tokenizer may yield; they become question marks."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
