"""The meeting place of rollout workers and learner: store, ledger and limiter behind one asyncio interface.

    worker ──lease──▶ [ledger, if the limiter grants it]        waits for: room, i.e. the learner's next sample
    worker ──append─▶ [store, one transaction for all queued]   waits for: the disk
    learner ─sample─▶ [store, once the limiter is content]      waits for: appends, or the end of leases
    learner ─commit─▶ [store]                                   waits for: the disk

One condition guards everything: whoever changes the state holds it until memory and disk agree, and then wakes all
waiters, each of which looks again at its own predicate. SQLite runs in one thread of its own. Changes to the store run
in shielded tasks, so that a caller who is cancelled never leaves memory behind the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from r2vpo.records import LeaseAnswer, SampledBatch, TrajectoryGroup
from replay.config import ReplayConfig
from replay.dispatcher import Dispatcher
from replay.errors import ReplayError
from replay.ledger import PromptLedger
from replay.limiter import Grant, LagLimiter
from replay.serialize import check_group
from replay.store import LATE, ReplayStore

SHARD = "shard-000.sqlite3"
"""Name of the store's file in its directory."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class _Wait:
    who: str
    what: Callable[[], str]
    since_s: float


class ReplayService:
    """PromptSource, GroupSink and GroupSource of one run. Construct it in any thread, use it in one event loop.

    With ``resume_step=None`` the directory must hold no store with groups in it; otherwise the store is rewound so
    that ``resume_step`` is the next step. ``ValueError`` says what does not fit, ``ReplayError`` what the disk refuses.
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
        num_fresh = config.num_fresh(groups_per_step)
        if num_fresh < 1:
            raise ValueError(
                f"replay.stale_fraction={config.stale_fraction} of learner.groups_per_step={groups_per_step} leaves no "
                "fresh group per step; lower stale_fraction or raise groups_per_step"
            )
        self._config = config
        self._seed = seed
        self._num_stale = config.num_stale(groups_per_step)
        limiter = LagLimiter(max_lag=config.max_lag, num_fresh=num_fresh, steps=steps)
        self._changed = asyncio.Condition()
        self._pending: list[TrajectoryGroup] = []
        self._flush: asyncio.Task[list[bool]] | None = None
        self._waits: dict[object, _Wait] = {}
        self._draining = False
        self._closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="replay-store")
        with ExitStack() as undo:
            undo.callback(self._thread.shutdown)
            path = Path(directory) / SHARD
            opened = self._thread.submit(_open, path, limiter, num_prompts, seed, resume_step).result()
            self._store, self._dispatcher = opened
            undo.pop_all()
        self._version = resume_step or 0  # the next step to commit
        self._learners_waiting = 0
        self._asks: dict[str, object] = {}

    async def lease(self, *, worker: str, version: int, count: int, timeout_s: float) -> LeaseAnswer:
        """Up to ``count`` leases for a worker that holds ``version``; waits at most ``timeout_s`` for the first.

        A worker that asks again, having taken over new weights, ends its earlier ask, which then grants nothing.
        """
        assert count >= 1, count
        ask = self._asks[worker] = object()

        def grant() -> Grant:
            return self._grant(worker, version, count)

        def superseded() -> bool:
            return self._asks[worker] is not ask

        async with self._changed:
            self._changed.notify_all()
            with self._shown(worker, lambda: grant().reason):
                await self._until(lambda: superseded() or grant().count > 0 or grant().exhausted, timeout_s)
            if superseded():
                return LeaseAnswer(leases=(), reason="the worker has asked again since")
            granted = grant()
            leases = self._dispatcher.lease(
                worker=worker,
                version=version,
                count=granted.count,
                now_s=time.time(),
                lease_s=self._config.lease_s,
            )
        return LeaseAnswer(leases=leases, reason=granted.reason, exhausted=granted.exhausted)

    async def release(self, *, worker: str, keys: tuple[str, ...]) -> None:
        """Give prompts back that will not be answered by this worker."""
        async with self._changed:
            if self._dispatcher.ledger.release(worker=worker, keys=keys):
                self._changed.notify_all()

    async def release_worker(self, *, worker: str) -> None:
        """Give back every prompt that ``worker`` holds: it is gone."""
        await self.release(worker=worker, keys=tuple(self._dispatcher.ledger.live))

    async def append(self, group: TrajectoryGroup) -> bool:
        """Return once the group is durable. True if it is new, False if its key was there already.

        ``ValueError`` for a malformed group, ``ReplayError`` if the disk refuses; the lease then goes on.
        """
        check_group(group)
        self._dispatcher.ledger.check(group.key)
        if self._flush is None:
            self._flush = asyncio.create_task(self._append_pending())
        self._pending.append(group)
        position = len(self._pending) - 1
        return (await asyncio.shield(self._flush))[position]

    async def sample(self, *, step: int, timeout_s: float) -> SampledBatch | None:
        """The batch of ``step``, or None if it is not complete within ``timeout_s``. Repeatable until committed.

        ``ValueError`` unless ``step`` is the next one to commit.
        """
        until = time.monotonic() + timeout_s
        batch = None
        self._learners_waiting += 1
        try:
            with self._shown("learner", self._dispatcher.lacking):
                while batch is None:
                    async with self._changed:
                        if not await self._until(lambda: self._may_take(step), until - time.monotonic()):
                            return None
                    batch = await asyncio.shield(self._take(step))
        finally:
            self._learners_waiting -= 1
        return batch

    async def commit(self, *, step: int, group_ids: tuple[int, ...]) -> None:
        """Record the groups as consumed by ``step``; the learner's version becomes ``step + 1``.

        The same commit again does nothing. ``ValueError`` for other groups than were sampled.
        """
        await asyncio.shield(self._commit(step, group_ids))

    async def read(self, group_ids: Sequence[int]) -> tuple[TrajectoryGroup, ...]:
        """Groups by id. ``LookupError`` for an unknown one, ``ReplayError`` for a damaged one."""
        return await self._in_store(lambda: tuple(self._store.get(i) for i in group_ids))

    async def stats(self) -> dict[str, Any]:
        """What the store holds and has handed out, and ``waits``: who waits for what, since when (Unix seconds)."""
        async with self._changed:
            self._expire()
            stored = await self._in_store(self._store.stats)
            eligible = await self._in_store(
                lambda: self._store.stale_eligible(
                    step=self._dispatcher.next_step, max_replay_lag=self._config.max_replay_lag
                )
            )
            return {
                **stored,
                "fresh_waiting": len(self._dispatcher.waiting),
                "in_flight": len(self._dispatcher.ledger.live),
                "stale_eligible": len(eligible),
                "draining": self._draining,
                "waits": [{"who": w.who, "what": w.what(), "since_s": w.since_s} for w in self._waits.values()],
            }

    async def set_draining(self) -> None:
        """Hand out no more prompts; those in flight may still be appended, and batches sampled."""
        async with self._changed:
            self._draining = True
            self._changed.notify_all()

    async def close(self) -> None:
        """Finish the appends that are queued, end every wait, and close the store. May be called twice."""
        if self._flush is not None:
            await asyncio.wait([self._flush])
        async with self._changed:
            if not self._closed:
                self._draining = True
                await self._in_store(self._store.close)
                self._closed = True
                self._thread.shutdown()
                self._changed.notify_all()

    # What follows runs with the condition held, except for _append_pending, _take and _commit, which take it.

    async def _append_pending(self) -> list[bool]:
        async with self._changed:
            # Everything that was queued while the last transaction ran goes into this one.
            groups, self._pending, self._flush = self._pending, [], None
            known = await self._in_store(lambda: self._store.ids(g.key for g in groups))
            fresh = {g.key: g for g in reversed(groups) if g.key not in known}  # of equal keys the first counts
            unusable = self._dispatcher.unusable(fresh.values())
            new, ids = await self._in_store(
                lambda: (self._store.append_many(groups, unusable), self._store.ids(g.key for g in groups))
            )
            for group, is_new in zip(groups, new, strict=True):
                if is_new:
                    usable = group.num_scored >= 2 and group.key not in unusable
                    self._dispatcher.appended(group, ids[group.key], usable=usable)
            self._changed.notify_all()
            return new

    async def _take(self, step: int) -> SampledBatch | None:
        async with self._changed:
            if not self._may_take(step):
                return None
            batch = await self._in_store(
                lambda: self._store.sample(
                    step=step,
                    num_fresh=self._dispatcher.limiter.num_fresh,
                    num_stale=self._num_stale,
                    max_lag=self._config.max_lag,
                    max_replay_lag=self._config.max_replay_lag,
                    seed=self._seed,
                )
            )
            assert batch is not None, "the store has fewer fresh groups than the service counted"
            self._dispatcher.taken(step, batch.group_ids)
            self._changed.notify_all()
            return batch

    async def _commit(self, step: int, group_ids: tuple[int, ...]) -> None:
        async with self._changed:
            await self._in_store(lambda: self._store.commit(step=step, group_ids=group_ids))
            if step == self._version:
                self._version = step + 1
                self._changed.notify_all()

    def _may_take(self, step: int) -> bool:
        if step != self._version:
            raise ValueError(f"step {step} cannot be sampled: the next step is {self._version}")
        already_chosen = self._dispatcher.next_step > step
        return already_chosen or not self._dispatcher.lacking()

    def _grant(self, worker: str, version: int, count: int) -> Grant:
        if self._draining:
            return Grant(count=0, reason="the run is draining and hands out no more prompts", exhausted=True)
        if self._learners_waiting and not self._dispatcher.lacking():
            # A lease that was granted now could make the learner wait although its batch is there.
            return Grant(count=0, reason=f"the learner is taking the batch of step {self._dispatcher.next_step}")
        return self._dispatcher.grant(worker=worker, version=version, count=count)

    async def _until(self, holds: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until ``holds()``; False once the time is up or the service is closed."""
        until = time.monotonic() + timeout_s
        while True:
            self._expire()
            if holds():
                return True
            left_s = min(until - time.monotonic(), self._dispatcher.ledger.next_deadline_s - time.time())
            if self._closed or time.monotonic() >= until:
                return False
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    def _expire(self) -> None:
        if self._dispatcher.ledger.expire(time.time()):
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

    async def _in_store(self, work: Callable[[], T]) -> T:
        if self._closed:
            raise ReplayError(f"replay store {self._store.path} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _open(
    path: Path, limiter: LagLimiter, num_prompts: int, seed: int, resume_step: int | None
) -> tuple[ReplayStore, Dispatcher]:
    """The store at the step where the run begins, and what is outstanding there."""
    with ExitStack() as undo:
        store = ReplayStore(path)
        undo.callback(store.close)
        keys = store.keys()
        if resume_step is None and keys:
            raise ValueError(
                f"replay store {path} holds {len(keys)} groups of an earlier run: resume it, or choose another name"
            )
        ledger = PromptLedger(num_prompts=num_prompts, seed=seed, done=keys)
        store.rewind(resume_step or 0)
        waiting = store.waiting()
        # All fit, unless the run goes on with a smaller max_lag or fewer fresh groups per step than it had.
        kept = limiter.kept(list(waiting.values()), next_step=store.version)
        late = [i for i, keep in zip(waiting, kept, strict=True) if not keep]
        store.set_aside(dict.fromkeys(late, LATE))
        undo.pop_all()
        return store, Dispatcher(limiter=limiter, ledger=ledger, waiting=store.waiting(), next_step=store.version)
