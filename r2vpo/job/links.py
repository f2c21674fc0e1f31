"""The wires between rooms: the Protocols of `records.py` and `replay`, spoken over Ray actor handles.

    worker ──ReplayLink──▶ replay store: leases, and where each shard is
           └─ShardLink───▶ shard ──ListenerLink──▶ replay store
    replay store ──ShardLink──▶ shard
    driver ──ShardLink──▶ shard ··ShardedBatch··▶ learner ranks, which fetch the payloads from the shard's node

Whoever is given these objects never sees a handle, nor learns which room is at the other end. An error names the
component at the other end, so that it is not taken for the worker's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from r2vpo.job.component import ANSWER_S, Component, ComponentDied, JobFailed
from r2vpo.records import BatchPlan, LeaseAnswer, SampledBatch, Stamp, TrajectoryGroup, WeightManifest
from replay.errors import ReplayError
from replay.rows import EncodedGroup, Rows, encode_group, shard_of_key
from replay.serialize import decode

MEET_S = 600.0
"""Longest time until all engines and the learner have met for broadcasts (seconds)."""
FETCH_S = 600.0
"""Longest time that the weights of one version, or the groups of one batch, may take over the network (seconds)."""
SCAN_S = 3600.0
"""Longest time that a shard may take to look through its file (seconds)."""
APPEND_S = 12 * 3600.0
"""Longest time that a finished group may wait for a shard: that of a night with a full disk, which the run shows."""
LOCATE_S = 30.0
"""Longest single wait for a shard to come back (seconds); the link asks again, so it bounds only one call."""
PAUSE_S = 1.0
"""Between two questions for a shard that is not there (seconds)."""


class ShardDied(ComponentDied, ReplayError):  # noqa: N818 - says what happened
    """The process of a replay shard is gone; another one will come for its file, or the run ends."""


@dataclass(frozen=True)
class ShardLink:
    """One shard, as workers, the replay store and the driver ask it. `ShardDied` once its process is gone."""

    shard: Component

    async def append(self, group: EncodedGroup) -> bool:
        """See ``ShardService.append``; waits as long as the disk is full."""
        return await self._ask("append", group, within_s=None)

    async def rows(self, *, oldest_version: int = 0, after_id: int = 0) -> Rows:
        """See ``ShardService.rows``."""
        return await self._ask("rows", oldest_version=oldest_version, after_id=after_id, within_s=SCAN_S)

    async def epochs(self) -> dict[int, int]:
        """See ``ShardService.epochs``."""
        return await self._ask("epochs", within_s=SCAN_S)

    async def answered(self, epoch: int) -> np.ndarray:
        """See ``ShardService.answered``."""
        return await self._ask("answered", epoch, within_s=SCAN_S)

    async def evict(self, group_ids: Sequence[int]) -> int:
        """See ``ShardService.evict``."""
        return await self._ask("evict", group_ids, within_s=SCAN_S)

    async def oldest_held(self, *, limit: int, after: tuple[int, int] = (-1, 0)) -> Rows:
        """See ``ShardService.oldest_held``."""
        return await self._ask("oldest_held", limit=limit, after=after, within_s=SCAN_S)

    async def held(self) -> tuple[int, int]:
        """See ``ShardService.held``."""
        return await self._ask("held")

    async def stats(self) -> dict[str, Any]:
        """See ``ShardService.stats``."""
        return await self._ask("stats")

    async def read(self, group_ids: Sequence[int]) -> tuple[ray.ObjectRef, dict[int, str]]:
        """Where the payloads of the groups are (a list in their order), and what is wrong with some: id → sentence.

        The payloads stay on the shard's node until somebody gets them.
        """
        payloads, problems = self.shard.actor.read.options(num_returns=2).remote(list(group_ids))
        try:
            return payloads, await self.shard.answer("read", problems, within_s=FETCH_S)
        except ComponentDied as death:
            raise ShardDied(str(death)) from death

    async def _ask(self, method: str, *arguments: Any, within_s: float | None = ANSWER_S, **settings: Any) -> Any:
        try:
            return await self.shard.ask(method, *arguments, within_s=within_s, **settings)
        except ComponentDied as death:
            raise ShardDied(str(death)) from death


@dataclass(frozen=True)
class ListenerLink:
    """What a shard says to the replay store. It may take as long as the store's own disk is full."""

    replay: Component

    async def appended(self, shard: int, rows: Rows) -> None:
        """See ``ReplayService.appended``."""
        await self.replay.ask("appended", shard, rows, within_s=None)

    async def stalled(self, shard: int, sentence: str, keys: Sequence[str]) -> None:
        """See ``ReplayService.stalled``."""
        await self.replay.ask("stalled", shard, sentence, keys, within_s=None)


@dataclass(frozen=True)
class ReplayLink:
    """PromptSource and GroupSink of a replay actor and its shards."""

    replay: Component
    shards: int
    """Number of shards."""
    _found: dict[int, tuple[int, ShardLink]] = field(default_factory=dict, repr=False, compare=False)
    """Shard → its newest known generation and the way to it."""

    async def lease(self, *, worker: str, stamp: Stamp, count: int, timeout_s: float) -> LeaseAnswer:
        """See ``PromptSource.lease``."""
        return await self.replay.ask(
            "lease", worker=worker, stamp=stamp, count=count, timeout_s=timeout_s, within_s=timeout_s + ANSWER_S
        )

    async def release(self, *, worker: str, keys: tuple[str, ...]) -> None:
        """See ``PromptSource.release``."""
        await self.replay.ask("release", worker=worker, keys=keys)

    async def append(self, group: TrajectoryGroup) -> bool:
        """See ``GroupSink.append``. A shard that dies meanwhile is waited for, and given the group again.

        ``JobFailed`` after `APPEND_S` seconds.
        """
        encoded = encode_group(group)
        shard = shard_of_key(group.key, self.shards)
        try:
            async with asyncio.timeout(APPEND_S):
                return await self._append(shard, encoded)
        except TimeoutError:
            raise JobFailed(
                f"replay shard {shard} did not take the group of prompt {group.key} within {APPEND_S / 3600:g} h"
            ) from None

    async def _append(self, shard: int, group: EncodedGroup) -> bool:
        dead = 0
        while True:
            generation, link = await self._locate(shard, after=dead)
            try:
                return await link.append(group)
            except ComponentDied:
                dead = generation  # the next one tells by the key whether the group was written

    async def _locate(self, shard: int, *, after: int) -> tuple[int, ShardLink]:
        """The shard in a generation above ``after``."""
        while (found := self._found.get(shard)) is None or found[0] <= after:
            answer = await self.replay.ask(
                "locate", shard, after=after, timeout_s=LOCATE_S, within_s=LOCATE_S + ANSWER_S
            )
            if answer is None:
                await asyncio.sleep(PAUSE_S)
            else:
                self._found[shard] = answer
        return found


@dataclass(frozen=True, kw_only=True)
class ShardedBatch:
    """BatchSource of a plan whose payloads lie where their shards are: they go to the learner's nodes from there."""

    plan: BatchPlan
    group_ids: tuple[tuple[int, ...], ...]
    """Per shard, the groups that it holds."""
    payloads: tuple[ray.ObjectRef, ...]
    """Per shard, their payloads in the same order."""

    def fetch(self) -> SampledBatch:
        """See ``BatchSource.fetch``. ``JobFailed`` if a payload does not arrive."""
        try:
            lists = ray.get(list(self.payloads), timeout=FETCH_S)
        except RayError as error:
            raise JobFailed(f"the groups of step {self.plan.step} did not arrive from the replay store") from error
        return self.plan.batch(
            {
                group_id: decode(payload)
                for ids, payloads in zip(self.group_ids, lists, strict=True)
                for group_id, payload in zip(ids, payloads, strict=True)
            }
        )


@dataclass(frozen=True)
class WeightLink:
    """WeightSource of a weight board; payloads come straight from the object store of the worker's own node."""

    board: Component

    async def newest(self, *, after: Stamp, timeout_s: float) -> WeightManifest | None:
        """See ``WeightSource.newest``."""
        return await self.board.ask("newest", after=after, timeout_s=timeout_s, within_s=timeout_s + ANSWER_S)

    async def fetch(self, manifest: WeightManifest) -> tuple[memoryview, ...]:
        """See ``WeightSource.fetch``."""
        refs = await self.board.ask("references", manifest.stamp, passing=(LookupError,))
        try:
            async with asyncio.timeout(FETCH_S):
                return tuple(memoryview(payload) for payload in await asyncio.gather(*refs))
        except RayError as error:  # the learner owns them, and took them along; the next one publishes anew
            raise LookupError(f"version {manifest.version} of the learner's weights is lost") from error
        except TimeoutError:
            raise JobFailed(f"version {manifest.version} of the weights did not arrive within {FETCH_S:g} s") from None


@dataclass(frozen=True)
class MeetingLink:
    """How learner rank 0 has the rollout workers join it for broadcasts; see ``NcclSender.meet``."""

    workers: tuple[Component, ...]

    def __call__(self, init_infos: Sequence[Mapping[str, Any]]) -> None:
        """Returns once all have joined. ``JobFailed`` if one cannot."""
        joins = [worker.actor.connect.remote(info) for worker, info in zip(self.workers, init_infos, strict=True)]
        names = ", ".join(worker.name for worker in self.workers)
        try:
            ray.get(joins, timeout=MEET_S)
        except RayError as error:
            raise JobFailed(f"the learner and {names} did not meet for broadcasts of the weights: {error}") from error
