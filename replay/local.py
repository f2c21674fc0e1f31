"""The whole store in one process: the service and its shards in one event loop, without Ray.

For tests, benchmarks and notebooks. A job wires the same parts over Ray actors.

    store = LocalStore("runs/mine/replay", config=ReplayConfig(), num_prompts=100, groups_per_step=8, steps=10, seed=0)
    await store.open()
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r2vpo.records import LeaseAnswer, SampledBatch, Stamp, TrajectoryGroup
from replay.config import ReplayConfig
from replay.rows import by_shard, encode_group, shard_of_key
from replay.schema import shard_file
from replay.serialize import decode
from replay.service import ReplayService
from replay.shard_service import ShardService


class LocalStore:
    """PromptSource and GroupSink, and what the learner's driver does with plans and payloads."""

    def __init__(
        self, directory: str | Path, *, config: ReplayConfig, resume_step: int | None = None, **run: Any
    ) -> None:
        """``run``: the other settings of ``ReplayService``."""
        self._directory, self._config = Path(directory), config
        self.service = ReplayService(str(directory), config=config, resume_step=resume_step, **run)
        """Leases, commits, statistics."""
        self.shards: dict[int, ShardService] = {}
        """The shards that are there."""

    async def open(self) -> None:
        """Open every shard. Errors as in ``ReplayService`` and ``ShardStore``; then everything is closed again."""
        try:
            for shard in range(self._config.shards):
                await self.attach(shard)
        except BaseException:
            await self.close()
            raise

    async def attach(self, shard: int) -> None:
        """Open a shard's file and let the service know of it."""
        path = self._directory / shard_file(shard)
        opened = ShardService(str(path), shard=shard, shards=self._config.shards, listener=self.service)
        self.shards[shard] = opened
        await self.service.attach(shard, opened)

    async def detach(self, shard: int) -> None:
        """Close a shard, as if its process had ended."""
        await self.service.detach(shard, "it was closed")
        await self.shards.pop(shard).close()

    async def append(self, group: TrajectoryGroup) -> bool:
        """See ``GroupSink.append``."""
        return await self.shards[shard_of_key(group.key, self._config.shards)].append(encode_group(group))

    async def sample(self, *, step: int, timeout_s: float) -> SampledBatch | None:
        """The batch of ``step`` with its payloads; damaged groups are set aside and others drawn in their place."""
        while (plan := await self.service.sample(step=step, timeout_s=timeout_s)) is not None:
            groups: dict[int, TrajectoryGroup] = {}
            problems: dict[int, str] = {}
            for shard, ids in by_shard(plan.group_ids, self._config.shards).items():
                payloads, wrong = await self.shards[shard].read(ids)
                problems |= wrong
                groups |= {i: decode(p) for i, p in zip(ids, payloads, strict=True) if p is not None}
            if not problems:
                return plan.batch(groups)
            await self.service.quarantine(step=step, problems=problems)
        return None

    async def read(self, group_ids: Sequence[int]) -> dict[int, TrajectoryGroup]:
        """Groups by id, as far as they can be read."""
        groups: dict[int, TrajectoryGroup] = {}
        for shard, ids in by_shard(group_ids, self._config.shards).items():
            payloads, _ = await self.shards[shard].read(ids)
            groups |= {i: decode(p) for i, p in zip(ids, payloads, strict=True) if p is not None}
        return groups

    async def lease(self, *, worker: str, stamp: Stamp, count: int, timeout_s: float) -> LeaseAnswer:
        """See ``PromptSource.lease``."""
        return await self.service.lease(worker=worker, stamp=stamp, count=count, timeout_s=timeout_s)

    async def release(self, *, worker: str, keys: tuple[str, ...]) -> None:
        """See ``PromptSource.release``."""
        await self.service.release(worker=worker, keys=keys)

    async def commit(self, *, step: int, group_ids: tuple[int, ...]) -> None:
        """See ``GroupSource.commit``."""
        await self.service.commit(step=step, group_ids=group_ids)

    async def rewind(self, *, step: int) -> None:
        """See ``ReplayService.rewind``."""
        await self.service.rewind(step=step)

    async def stats(self) -> dict[str, Any]:
        """See ``ReplayService.stats``."""
        return await self.service.stats()

    async def close(self) -> None:
        """Close shards and service. May be called twice."""
        await asyncio.gather(*(shard.close() for shard in self.shards.values()))
        await self.service.close()
