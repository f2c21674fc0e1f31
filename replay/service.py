"""The meeting place of rollout workers and learner: ledger, limiter and index behind one asyncio interface.

    worker ──lease──▶ [ledger, if the limiter grants it]            waits for: room, i.e. the learner's next sample
    shard ──appended─▶ [index]                                      waits for: whoever changes the state just now
    learner ─sample─▶ [index, once the limiter is content; choice]  waits for: appends, the end of leases, a shard
    learner ─commit─▶ [consumption log]                             waits for: the disk

Groups lie in the shards; what became of them lies in the consumption log, which is written here and nowhere else. One
condition guards everything: whoever changes the state holds it until memory and disk agree, and then wakes all waiters,
each of which looks again at its own predicate. SQLite runs in one thread of its own. Changes to the log run in shielded
tasks, so that a caller who is cancelled never leaves memory behind the disk.

It serves once every shard has been attached. A shard that dies is detached, and attached again when it is back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo.records import BatchPlan, LeaseAnswer, Stamp
from replay.config import ReplayConfig
from replay.consumption import ConsumptionLog
from replay.dispatcher import DAMAGED, Dispatcher
from replay.errors import ReplayError
from replay.index import Index
from replay.intake import Intake, not_empty
from replay.limiter import Grant
from replay.log_thread import LogThread
from replay.roster import Shard, ShardState, count
from replay.rows import Rows
from replay.schema import CONSUMPTION_FILE
from replay.sweeper import Sweeper

LOST_S = 60.0
"""Within which a shard that cannot be read must turn out to be lost; else it is its file (seconds)."""


@dataclass(frozen=True, kw_only=True)
class _Wait:
    who: str
    what: Callable[[], str]
    since_s: float


class ReplayService:
    """PromptSource and GroupSource of one run. Construct it in any thread, use it in one event loop.

    With ``resume_step=None`` the store must be empty; otherwise it is rewound so that ``resume_step`` is the next step.
    ``ValueError`` says what does not fit, ``ReplayError`` what the disk refuses.
    """

    def __init__(
        self,
        directory: str,
        *,
        config: ReplayConfig,
        num_prompts: int,
        groups_per_step: int,
        steps: int,
        seed: int,
        resume_step: int | None = None,
    ) -> None:
        self._config, self._groups_per_step, self._steps, self._seed = config, groups_per_step, steps, seed
        self._num_prompts = num_prompts
        self._resume_step = resume_step
        self._version = resume_step or 0  # the next step to commit
        self._changed = asyncio.Condition()
        self._waits: dict[object, _Wait] = {}
        self._draining = self._closed = False
        self._learners_waiting = 0
        self._asks: dict[str, object] = {}
        self._gone: set[str] = set()
        self._shards = [ShardState(number) for number in range(config.shards)]
        self._index: Index | None = None
        self._chosen: BatchPlan | None = None  # the batch in work
        self._num_rewinds = 0  # the lineage of the weights that may be sampled from
        self._sweep: asyncio.Task[None] | None = None
        self._log = LogThread(lambda: self._open_log(Path(directory)))
        self._sweeper = Sweeper(config, shards=self._shards, changed=self._changed, log=self._log)
        self._intake = Intake(config, shards=self._shards, log=self._log, sweeper=self._sweeper)

    # Shards

    async def attach(self, shard: int, link: Shard) -> None:
        """A shard is there, for the first time or again; all of its groups count from now on."""
        state = self._shards[shard]
        async with self._changed:
            state.link = link
            state.generation += 1
            state.speak("")
            try:
                if self._index is not None:
                    await self._intake.bring_back(self._index, state, link)
                else:
                    await self._load()
            except ReplayError as error:  # it is as far away as before
                state.link = None
                state.speak(f"replay shard {shard}: {error}")
                raise
            finally:
                self._changed.notify_all()

    async def detach(self, shard: int, reason: str) -> None:
        """A shard cannot be reached: its groups and prompts wait until it is attached again."""
        async with self._changed:
            state = self._shards[shard]
            state.link = None
            state.speak(f"replay shard {shard}: {reason}")
            if self._index is not None:
                self._index.leave(shard)
            self._changed.notify_all()

    async def locate(self, shard: int, *, after: int, timeout_s: float) -> tuple[int, Shard] | None:
        """A shard's generation, above ``after``, and its link; None if it is not there within ``timeout_s``."""
        state = self._shards[shard]
        async with self._changed:
            there = await self._until(lambda: state.link is not None and state.generation > after, timeout_s)
            return (state.generation, state.link) if there and state.link is not None else None

    async def appended(self, shard: int, rows: Rows) -> None:
        """A shard has made groups durable, in the order of their ids. May be said twice."""
        async with self._changed:
            if self._index is not None:  # else they are read with all others when the last shard is attached
                await self._intake.take_in(self._index, self._shards[shard], rows)
                self._changed.notify_all()
        self._make_room()

    async def stalled(self, shard: int, sentence: str, keys: Sequence[str]) -> None:
        """Finished groups wait for a shard's disk; their leases go on meanwhile. "" once that is over."""
        async with self._changed:
            self._shards[shard].speak(sentence)
            if self._index is not None:
                self._dispatcher.ledger.extend(keys, deadline_s=time.time() + self._config.lease_s)
            self._changed.notify_all()

    # Rollout workers

    async def lease(self, *, worker: str, stamp: Stamp, count: int, timeout_s: float) -> LeaseAnswer:
        """Up to ``count`` leases for a worker that holds ``stamp``; waits at most ``timeout_s`` for the first.

        A worker that asks again, having taken over new weights, ends its earlier ask, which then grants nothing.
        """
        assert count >= 1, count
        ask = self._asks[worker] = object()

        def grant() -> Grant:
            return self._grant(worker, stamp, count)

        def superseded() -> str:
            if worker in self._gone:
                return "the worker is gone"
            return "the worker has asked again since" if self._asks[worker] is not ask else ""

        async with self._changed:
            self._changed.notify_all()
            with self._shown(worker, lambda: grant().reason):
                await self._until(lambda: bool(superseded()) or grant().count > 0 or grant().exhausted, timeout_s)
            if reason := superseded():
                return LeaseAnswer(leases=(), reason=reason)
            granted = grant()
            if not granted.count:
                return LeaseAnswer(leases=(), reason=granted.reason, exhausted=granted.exhausted)
            leases = self._dispatcher.lease(
                worker=worker,
                version=stamp[1],
                count=granted.count,
                now_s=time.time(),
                lease_s=self._config.lease_s,
            )
        return LeaseAnswer(leases=leases, reason=granted.reason)

    async def release(self, *, worker: str, keys: tuple[str, ...]) -> None:
        """Give prompts back that will not be answered by this worker."""
        async with self._changed:
            if self._index is not None and self._dispatcher.ledger.release(worker=worker, keys=keys):
                self._changed.notify_all()

    async def release_worker(self, *, worker: str) -> None:
        """Give back every prompt that ``worker`` holds: it is gone, and what it has asked for grants nothing."""
        async with self._changed:
            self._gone.add(worker)
            if self._index is not None:
                self._dispatcher.ledger.release(worker=worker, keys=tuple(self._dispatcher.ledger.live))
            self._changed.notify_all()

    # The learner

    async def sample(self, *, step: int, timeout_s: float) -> BatchPlan | None:
        """The batch of ``step``, or None if it is not complete within ``timeout_s``. Repeatable until committed.

        ``ValueError`` unless ``step`` is the next one to commit.
        """
        until = time.monotonic() + timeout_s
        plan = None
        self._learners_waiting += 1
        try:
            with self._shown("learner", self._lacking):
                while plan is None:
                    async with self._changed:
                        if not await self._until(lambda: self._may_take(step), until - time.monotonic()):
                            return None
                    plan = await asyncio.shield(self._take(step))
        finally:
            self._learners_waiting -= 1
        return plan

    async def quarantine(self, *, step: int, problems: Mapping[int, str]) -> None:
        """Groups (id → what is wrong) of the batch of ``step`` cannot be read: never draw them, draw the step anew."""
        await asyncio.shield(self._quarantine(step, problems))

    async def commit(self, *, step: int, group_ids: tuple[int, ...]) -> None:
        """Record the groups as consumed by ``step``; the learner's version becomes ``step + 1``.

        The same commit again does nothing. ``ValueError`` for other groups than were sampled.
        """
        await asyncio.shield(self._commit(step, group_ids))
        self._make_room()

    async def keep_from(self, *, step: int) -> None:
        """The run may be resumed at ``step`` or later, never before it: older consumption need not be kept for that."""
        async with self._changed:
            self._sweeper.pinned_step = max(self._sweeper.pinned_step, step)
        self._make_room()

    async def rewind(self, *, step: int) -> None:
        """The learner has gone back: ``step`` is the next one, and what it and later ones consumed is undone.

        Every lease is taken back, since workers hold weights that the learner will not have had; a group that is
        appended all the same is set aside if a token of it is newer than the learner. ``ValueError`` if the log has
        not come as far as ``step``.
        """
        await asyncio.shield(self._rewind(step))

    # The job

    async def hosts(self) -> dict[int, str]:
        """The host that each shard's file lies on, as far as it was recorded."""
        return await self._log.do(lambda log: log.hosts)

    async def set_hosts(self, hosts: Mapping[int, str]) -> None:
        """Record where the shards' files lie."""
        await self._log.do(lambda log: log.set_hosts(dict(hosts)))

    async def stats(self) -> dict[str, Any]:
        """What the store holds and has handed out; ``waits``: who waits for what, since when (Unix seconds).

        ``troubles`` are sentences about what keeps the store from working as it should. Never waits for a full disk.
        """
        await asyncio.gather(*(state.refresh() for state in self._shards))
        if not self._changed.locked():  # who holds it may be waiting for the disk
            async with self._changed:
                self._expire()
        logged = await self._log.ask(lambda log: log.stats())
        return {
            **count(self._shards, logged, min_verdicts=self._config.min_verdicts),
            "fresh_waiting": len(self._dispatcher.waiting) if self._index else 0,
            "in_flight": len(self._dispatcher.ledger.live) if self._index else 0,
            "stale_eligible": len(self._index.pool) if self._index else 0,
            "draining": self._draining,
            "waits": [{"who": w.who, "what": w.what(), "since_s": w.since_s} for w in self._waits.values()],
            "troubles": [text for text in (self._log.trouble, *(state.trouble for state in self._shards)) if text],
        }

    async def set_draining(self) -> None:
        """Hand out no more prompts; those in flight may still be appended, and batches sampled."""
        async with self._changed:
            self._draining = True
            self._changed.notify_all()

    async def close(self) -> None:
        """End every wait and close the log. May be called twice."""
        if self._sweep is not None:
            await asyncio.wait([self._sweep])
        async with self._changed:
            if not self._closed:
                self._draining = True
                await self._log.close()
                self._closed = True
                self._changed.notify_all()

    # What follows runs with the condition held, except for what takes it: _take, _quarantine, _commit.

    @property
    def _dispatcher(self) -> Dispatcher:
        assert self._index is not None, "not all shards are attached"
        return self._index.dispatcher

    def _open_log(self, directory: Path) -> ConsumptionLog:
        log = ConsumptionLog(directory / CONSUMPTION_FILE, shards=self._config.shards)
        try:
            if self._resume_step is None and log.version > 0:
                raise not_empty(str(log.path), f"{log.version} steps")
            log.rewind(self._resume_step or 0)
        except BaseException:
            log.close()
            raise
        return log

    async def _load(self) -> None:
        """Read all shards, if they are there."""
        if all(state.link is not None for state in self._shards):
            self._index = await self._intake.load(
                num_prompts=self._num_prompts,
                groups_per_step=self._groups_per_step,
                steps=self._steps,
                seed=self._seed,
                next_step=self._version,
                must_be_empty=self._resume_step is None,
            )

    async def _rewind(self, step: int) -> None:
        is_done = False
        while not is_done:
            if self._sweep is not None:
                await asyncio.wait([self._sweep])
            async with self._changed:
                if self._sweep is not None and not self._sweep.done():
                    continue  # it began meanwhile, and would evict by what holds no more
                self._chosen, self._index = None, None  # from here on none begins
                await self._log.do(lambda log: log.rewind(step))
                self._version = self._resume_step = step
                self._num_rewinds += 1
                self._asks = {worker: object() for worker in self._asks}
                try:
                    await self._load()
                except ReplayError:
                    # A shard has died, and nobody has said so yet. All are read when it is back.
                    if not await self._until(lambda: any(state.link is None for state in self._shards), LOST_S):
                        raise
                self._changed.notify_all()
                is_done = True

    async def _take(self, step: int) -> BatchPlan | None:
        async with self._changed:
            if not self._may_take(step):
                return None
            assert self._index is not None
            plan = await self._log.do(lambda log: log.chosen())
            if plan is None:
                plan = self._index.draw(step)
                await self._log.do(lambda log: log.choose(plan))
                self._chosen = plan
                self._changed.notify_all()
            return plan

    async def _quarantine(self, step: int, problems: Mapping[int, str]) -> None:
        async with self._changed:
            plan = await self._log.do(lambda log: log.chosen())
            if plan is None or plan.step != step:
                raise ValueError(f"step {step} has no batch to draw anew: it is committed, or was never sampled")
            damaged = {i: DAMAGED for i in problems if i in plan.group_ids}
            assert self._index is not None
            await self._intake.set_aside(damaged)
            await self._log.do(lambda log: log.drop_choice())
            self._index.undo(plan, damaged)
            self._chosen = None
            self._changed.notify_all()

    async def _commit(self, step: int, group_ids: tuple[int, ...]) -> None:
        async with self._changed:
            await self._log.do(lambda log: log.commit(step=step, group_ids=group_ids))
            if step == self._version:
                assert self._index is not None
                assert self._chosen is not None
                self._index.committed(self._chosen)
                self._chosen = None
                self._version = step + 1
                self._changed.notify_all()

    def _may_take(self, step: int) -> bool:
        if step != self._version:
            raise ValueError(f"step {step} cannot be sampled: the next step is {self._version}")
        return not self._lacking()

    def _lacking(self) -> str:
        """What the learner waits for; empty if it may have its batch."""
        if self._index is None:
            return "; ".join(state.trouble for state in self._shards if state.trouble) or "the shards are being read"
        if self._chosen is not None:
            away = self._dispatcher.away & self._index.shards_of(self._chosen)
            return "; ".join(self._shards[shard].trouble for shard in sorted(away))
        if self._dispatcher.next_step > self._version:
            return ""  # a window whose choice was undone is drawn anew from what it took
        return self._dispatcher.lacking()

    def _grant(self, worker: str, stamp: Stamp, count: int) -> Grant:
        lineage, version = stamp
        if self._draining:
            return Grant(count=0, reason="the run is draining and hands out no more prompts", exhausted=True)
        if self._index is None:
            return Grant(count=0, reason="the replay store is not complete yet: " + self._lacking())
        if lineage < self._num_rewinds:
            return Grant(count=0, reason=f"worker {worker} holds weights that the learner has gone back behind")
        if self._learners_waiting and self._chosen is None and not self._lacking():
            # A lease that was granted now could make the learner wait although its batch is there.
            return Grant(count=0, reason=f"the learner is taking the batch of step {self._dispatcher.next_step}")
        granted = self._dispatcher.grant(worker=worker, version=version, count=count)
        room = self._sweeper.room(len(self._dispatcher.ledger.live))
        if granted.count <= room.count:
            return granted
        self._make_room()
        return Grant(count=room.count, reason=room.reason)

    def _make_room(self) -> None:
        """Let a sweep look at the store, unless one does."""
        idle = self._sweep is None or self._sweep.done()
        if self._sweeper.enabled and idle and self._index is not None and not self._closed:
            self._sweep = asyncio.create_task(self._sweeper.sweep(self._index, lambda: self._chosen))

    async def _until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``holds()``; False once the time is up or the service is closed."""
        until = time.monotonic() + timeout_s
        while True:
            self._expire()
            if holds():
                return True
            deadline_s = self._dispatcher.ledger.next_deadline_s if self._index else float("inf")
            left_s = min(until - time.monotonic(), deadline_s - time.time())
            if self._closed or time.monotonic() >= until:
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    def _expire(self) -> None:
        if self._index is not None and self._dispatcher.ledger.expire(time.time()):
            self._changed.notify_all()

    @contextmanager
    def _shown(self, who: str, what: Callable[[], str]) -> Iterator[None]:
        """List a wait in ``stats`` while it lasts."""
        mark = object()
        self._waits[mark] = _Wait(who=who, what=what, since_s=time.time())
        try:
            yield
        finally:
            del self._waits[mark]
