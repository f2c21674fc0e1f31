"""Carries eviction out: walks the held payloads from the oldest on and drops what `eviction` gives up.

A sweep runs beside everything else. What it will drop it first takes out of the pool, with the condition held, so that
no batch can draw it any more; groups that the service was not told of yet are left alone, since nobody has decided
whether they wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import numpy as np

from r2vpo.records import BatchPlan
from replay.config import ReplayConfig
from replay.errors import ReplayError
from replay.eviction import Eviction, merged
from replay.index import Index
from replay.limiter import Grant
from replay.log_thread import LogThread
from replay.roster import ShardState
from replay.rows import Rows, by_shard

PAGE = 1024
"""Rows asked of each shard at a time."""

logger = logging.getLogger(__name__)


class Sweeper:
    """Keeps count of the payloads that are held, and drops those that need not be."""

    def __init__(
        self,
        config: ReplayConfig,
        *,
        shards: Sequence[ShardState],
        changed: asyncio.Condition,
        log: LogThread,
    ) -> None:
        """``changed`` guards index and counts."""
        self._eviction = Eviction(config)
        self._config, self._shards, self._changed, self._log = config, shards, changed, log
        self._swept_step = 0
        self.held_groups = self.held_bytes = 0
        """Payloads in all shards, also those that are away."""
        self.pinned_step = 0
        """The run may go back to this step, not before it: what was consumed from here on is needed."""

    @property
    def enabled(self) -> bool:
        """Whether anything is ever evicted."""
        return self._eviction.enabled

    def appended(self, rows: Rows) -> None:
        """New groups are held."""
        self.held_groups += len(rows)
        self.held_bytes += int(rows["num_bytes"].sum())

    def room(self, in_flight: int) -> Grant:
        """How many more prompts may be handed out; see ``Eviction.room``."""
        return self._eviction.room(held_groups=self.held_groups, held_bytes=self.held_bytes, in_flight=in_flight)

    async def sweep(self, index: Index, chosen: Callable[[], BatchPlan | None]) -> None:
        """One pass over the store. ``chosen`` says which batch is in work; asked with the condition held.

        It ends early where a shard is lost or its disk is full; a later one goes on.
        """
        try:
            await self._drop_used_up(index, chosen)
            await self._drop_old(index, chosen)
        except ReplayError as error:
            logger.warning("eviction is put off: %s", error)

    async def _drop_old(self, index: Index, chosen: Callable[[], BatchPlan | None]) -> None:
        """By lag and by capacity, the oldest first."""
        after, done = (-1, 0), False
        while not done:
            page = await self._page(after)
            if not len(page):
                return
            async with self._changed:
                needed = await self._needed(index, chosen())
                dispatcher = index.dispatcher
                room = dispatcher.limiter.num_fresh * (self._config.max_lag + 1) - len(dispatcher.waiting)
                victims = self._eviction.look(
                    page[self._known(page)],
                    step=dispatcher.next_step,
                    needed=needed,
                    held_groups=self.held_groups,
                    held_bytes=self.held_bytes,
                    num_incoming=max(room, 0),
                )
                index.pool.remove(victims.group_ids)
            await self._drop(victims.group_ids)
            done = victims.done
            after = int(page["oldest_version"][-1]), int(page["id"][-1])

    async def _drop_used_up(self, index: Index, chosen: Callable[[], BatchPlan | None]) -> None:
        if self._config.max_uses is None or self._swept_step == self.pinned_step:
            return
        pinned_step = self.pinned_step
        async with self._changed:
            needed = await self._needed(index, chosen())
            consumed = await self._log.do(lambda log: log.consumed_since(self._swept_step))
            uses = await self._log.do(lambda log: log.uses(oldest_id=min(consumed, default=1)))
            counted = [(int(i), int(count)) for i, count in uses if i in consumed]
            victims = self._eviction.used_up(counted, needed=needed)
            index.pool.remove(victims)
        await self._drop(victims)
        self._swept_step = pinned_step

    async def _needed(self, index: Index, chosen: BatchPlan | None) -> set[int]:
        """Groups that wait, are in the batch in work, or were consumed by a step that may be computed again."""
        consumed = await self._log.do(lambda log: log.consumed_since(self.pinned_step))
        return {*consumed, *index.dispatcher.waiting, *(chosen.group_ids if chosen else ())}

    async def _page(self, after: tuple[int, int]) -> Rows:
        links = [state.link for state in self._shards if state.link is not None]
        pages = await asyncio.gather(*(link.oldest_held(limit=PAGE, after=after) for link in links))
        return merged(pages, limit=PAGE)

    def _known(self, page: Rows) -> np.ndarray:
        known = np.array([state.known_id for state in self._shards])
        return page["id"] <= known[(page["id"] - 1) % len(self._shards)]

    async def _drop(self, group_ids: Sequence[int]) -> None:
        for shard, ids in by_shard(group_ids, len(self._shards)).items():
            link = self._shards[shard].link
            if link is None:
                continue  # its payloads stay until a later sweep
            num_groups, num_bytes = await link.evict(ids)
            async with self._changed:
                self.held_groups -= num_groups
                self.held_bytes -= num_bytes
                self._changed.notify_all()
