"""How groups get from the shards into the index: all of them at the start, one shard's when it is back, new ones."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from r2vpo.records import prompt_key
from replay.config import ReplayConfig
from replay.index import Index
from replay.ledger import PromptLedger
from replay.log_thread import LogThread
from replay.roster import Shard, ShardState, sum_by_key
from replay.rows import Rows
from replay.sweeper import Sweeper


class Intake:
    """Reads what the shards hold and the log says of it. Its callers hold the service's condition."""

    def __init__(self, config: ReplayConfig, *, shards: Sequence[ShardState], log: LogThread, sweeper: Sweeper) -> None:
        self._config, self._shards, self._log, self._sweeper = config, shards, log, sweeper

    async def load(
        self, *, num_prompts: int, groups_per_step: int, steps: int, seed: int, next_step: int, must_be_empty: bool
    ) -> Index:
        """The index over all shards, as the run begins. ``ValueError`` if it ``must_be_empty`` and is not."""
        links = [state.link for state in self._shards if state.link is not None]
        # Before the prompts that are answered: a group that is appended meanwhile is then missing here, and is told of
        # afterwards, and not known here and still to do there.
        loaded = await asyncio.gather(*(self._read_rows(link, next_step) for link in links))
        counts = sum_by_key(await asyncio.gather(*(link.epochs() for link in links)))
        if must_be_empty and counts:
            raise not_empty(str(self._log.log.path.parent), f"{sum(counts.values())} groups")
        done = {
            epoch: np.concatenate(await asyncio.gather(*(link.answered(epoch) for link in links))) for epoch in counts
        }
        index = Index(
            self._config,
            groups_per_step=groups_per_step,
            steps=steps,
            seed=seed,
            next_step=next_step,
            ledger=PromptLedger(num_prompts=num_prompts, seed=seed, done=done, shards=len(links)),
        )
        for state, rows in zip(self._shards, loaded, strict=True):
            state.known_id = int(rows["id"].max(initial=0))
        rows = np.concatenate(loaded)
        uses = await self._uses(rows)
        aside = await self._log.do(lambda log: log.aside())
        await self.set_aside(index.load(rows, uses=uses, aside=aside))
        held = await asyncio.gather(*(link.held() for link in links))
        self._sweeper.held_groups, self._sweeper.held_bytes = (sum(column) for column in zip(*held, strict=True))
        return index

    async def bring_back(self, index: Index, state: ShardState, link: Shard) -> None:
        """A shard is back: first what was known of it, then what it has that nobody was told of."""
        ledger = index.dispatcher.ledger
        rows = await self._read_rows(link, index.dispatcher.next_step)
        epochs = {epoch for epoch, _ in ledger.open()}
        answered = {epoch: set((await link.answered(epoch)).tolist()) for epoch in sorted(epochs)}
        index.leave(state.number)  # nothing of it counts twice, if it has died unnoticed
        known = rows[rows["id"] <= state.known_id]
        aside = await self._log.do(lambda log: log.aside())
        await self.set_aside(index.return_(state.number, known, await self._uses(known), aside))
        await self.take_in(index, state, rows)
        # What is too old to be trained on is not among the rows, but need not be generated again either.
        for epoch, prompt_index in ledger.open():
            if prompt_index in answered.get(epoch, ()):
                ledger.answered(prompt_key(epoch, prompt_index))

    async def take_in(self, index: Index, state: ShardState, rows: Rows) -> None:
        """Groups that a shard has made durable; those that are known already change nothing."""
        new = rows[rows["id"] > state.known_id]
        await self.set_aside(index.arrived(new))
        state.known_id = int(new["id"].max(initial=state.known_id))
        self._sweeper.appended(new)

    async def set_aside(self, reasons: dict[int, str]) -> None:
        """Record groups (id → reason) that are never drawn."""
        if reasons:
            await self._log.do(lambda log: log.set_aside(reasons))

    async def _read_rows(self, link: Shard, step: int) -> Rows:
        """The groups that may still be trained on at ``step``."""
        oldest = step - max(self._config.max_lag, self._config.max_replay_lag)
        return await link.rows(oldest_version=max(oldest, 0))

    async def _uses(self, rows: Rows) -> np.ndarray:
        """How often each row's group was consumed: int64 ``[rows]``."""
        counted = await self._log.do(lambda log: log.uses(oldest_id=int(rows["id"].min(initial=1 << 62))))
        uses = np.zeros(len(rows), dtype=np.int64)
        at = np.searchsorted(counted[:, 0], rows["id"])
        found = at < len(counted)
        found[found] = counted[at[found], 0] == rows["id"][found]
        uses[found] = counted[at[found], 1]
        return uses


def not_empty(path: str, what: str) -> ValueError:
    """The store of a new run holds something."""
    return ValueError(
        f"replay store {path} holds {what} of an earlier run: resume it with --resume, or choose another name"
    )
