"""The wires between rooms: the Protocols of `records.py`, spoken over Ray actor handles.

Rollout workers are given these objects; they never see a handle, nor learn which room is at the other end.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from r2vpo.records import LeaseAnswer, TrajectoryGroup, WeightManifest


@dataclass(frozen=True)
class ReplayLink:
    """PromptSource and GroupSink of a replay actor."""

    actor: Any

    async def lease(self, *, worker: str, version: int, count: int, timeout_s: float) -> LeaseAnswer:
        """See ``PromptSource.lease``."""
        return await self.actor.lease.remote(worker=worker, version=version, count=count, timeout_s=timeout_s)

    async def release(self, *, worker: str, keys: tuple[str, ...]) -> None:
        """See ``PromptSource.release``."""
        await self.actor.release.remote(worker=worker, keys=keys)

    async def append(self, group: TrajectoryGroup) -> bool:
        """See ``GroupSink.append``."""
        return await self.actor.append.remote(group)


@dataclass(frozen=True)
class WeightLink:
    """WeightSource of a weight board; payloads come straight from the object store of the worker's own node."""

    board: Any

    async def newest(self, *, after: int, timeout_s: float) -> WeightManifest | None:
        """See ``WeightSource.newest``."""
        return await self.board.newest.remote(after=after, timeout_s=timeout_s)

    async def fetch(self, manifest: WeightManifest) -> tuple[memoryview, ...]:
        """See ``WeightSource.fetch``."""
        refs = await self.board.references.remote(manifest.version)
        return tuple(memoryview(payload) for payload in await asyncio.gather(*refs))
