"""The wires between rooms: the Protocols of `records.py`, spoken over Ray actor handles.

Rollout workers are given these objects; they never see a handle, nor learn which room is at the other end. An error
names the component at the other end, so that it is not taken for the worker's own.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from ray.exceptions import RayError

from r2vpo.job.component import ANSWER_S, Component, JobFailed
from r2vpo.records import LeaseAnswer, TrajectoryGroup, WeightManifest

FETCH_S = 600.0
"""Longest time that the weights of one version may take from the learner to a worker (seconds)."""


@dataclass(frozen=True)
class ReplayLink:
    """PromptSource and GroupSink of a replay actor."""

    replay: Component

    async def lease(self, *, worker: str, version: int, count: int, timeout_s: float) -> LeaseAnswer:
        """See ``PromptSource.lease``."""
        return await self.replay.ask(
            "lease", worker=worker, version=version, count=count, timeout_s=timeout_s, within_s=timeout_s + ANSWER_S
        )

    async def release(self, *, worker: str, keys: tuple[str, ...]) -> None:
        """See ``PromptSource.release``."""
        await self.replay.ask("release", worker=worker, keys=keys)

    async def append(self, group: TrajectoryGroup) -> bool:
        """See ``GroupSink.append``."""
        return await self.replay.ask("append", group)


@dataclass(frozen=True)
class WeightLink:
    """WeightSource of a weight board; payloads come straight from the object store of the worker's own node."""

    board: Component

    async def newest(self, *, after: int, timeout_s: float) -> WeightManifest | None:
        """See ``WeightSource.newest``."""
        return await self.board.ask("newest", after=after, timeout_s=timeout_s, within_s=timeout_s + ANSWER_S)

    async def fetch(self, manifest: WeightManifest) -> tuple[memoryview, ...]:
        """See ``WeightSource.fetch``."""
        refs = await self.board.ask("references", manifest.version, passing=(LookupError,))
        try:
            async with asyncio.timeout(FETCH_S):
                return tuple(memoryview(payload) for payload in await asyncio.gather(*refs))
        except RayError as error:  # the learner owns them, and took them along
            raise JobFailed(f"version {manifest.version} of the learner's weights is lost") from error
        except TimeoutError:
            raise JobFailed(f"version {manifest.version} of the weights did not arrive within {FETCH_S:g} s") from None
