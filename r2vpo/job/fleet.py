"""The rollout workers as the driver sees them: as many as are wanted, each replaced when it fails.

    scale, drain ──▶ target ──reconcile──▶ place ──launch──▶ worker ──starts──▶ serves ──drained──▶ gone
                                             ▲                  │ dies, hangs, or fails
                                             └─────replaced─────┘

A *place* is one worker that the run should have; who fills it has a name that is never given again, so that nothing a
dead worker has left behind is taken for its successor's. Workers pull: nothing here hands them work. A worker that is
gone gives its leases back at once, and its successor takes none before the canary has proven its weights.

Consumes what `scale` and `drain` ask for, and the ends of workers; waits for either.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import NoReturn

from r2vpo.job.component import (
    Component,
    ComponentLost,
    ComponentSilent,
    FailedForGood,
    JobFailed,
    cancelled,
    together,
)
from r2vpo.job.crew import DRAINING, SERVING, STARTING, Launcher, Worker
from r2vpo.job.restarts import Restarts
from r2vpo.job.settings import ConfigError
from r2vpo.job.status import ComponentStatus
from r2vpo.records import Evaluation, RolloutStats

HEARTBEAT_S = 2.0
"""Between two questions to a worker what it does (seconds)."""
STATS_S = 1.0
"""Longest wait of a learner step for the workers' counts (seconds); who is later is counted with the next step."""
STOP_TIMEOUT_S = 10.0
"""Longest wait for a worker to end its engine (seconds)."""
EVALUATION_TIMEOUT_S = 3600.0
"""Longest time that an evaluation may take (seconds)."""
TRIES = 3
"""Workers that may fail at one evaluation."""


class Place:
    """One worker that the run should have, whoever fills it."""

    def __init__(self, number: int, worker: Worker) -> None:
        self.number = number
        self.pool = worker.pool
        self.worker = worker
        self.task: asyncio.Task[None] | None = None
        self.has_served = False
        self.is_leaving = False

    @property
    def role(self) -> str:
        """The name under which its failures are counted."""
        return f"rollout worker {self.number}"


class Fleet:
    """All rollout workers. ``start`` once, then ``keep`` as long as the run lasts."""

    def __init__(
        self,
        launcher: Launcher,
        *,
        workers: Mapping[str, int],
        replay: Component,
        restarts: Restarts,
        note: Callable[[str], None],
        eval_prompts: int,
        start_timeout_s: float,
        silent_s: float,
        fixed: str = "",
        spot: Collection[str] = (),
    ) -> None:
        """``workers`` of every pool at first. ``note`` takes sentences for a person.

        The deaths of workers of the pools ``spot`` are expected. ``fixed`` says why none may come, go or be replaced;
        "" if they may.
        """
        self._launcher, self._replay, self._restarts, self._note = launcher, replay, restarts, note
        self._eval_prompts, self._start_timeout_s, self._silent_s = eval_prompts, start_timeout_s, silent_s
        self._fixed = fixed
        self._spot = spot
        self._targets = dict(workers)
        self._num_launched = self._num_places = 0
        self._closed_nodes: set[str] = set()
        self._places: list[Place] = []
        self._changed = asyncio.Event()

    # The life of the fleet

    async def start(self) -> None:
        """Start every engine; the first that fails, or is not up within ``rollout.start_timeout_s``, is named."""
        self._places = [self._new_place(pool) for pool, count in self._targets.items() for _ in range(count)]
        await together(*(self._start(place, within_s=self._start_timeout_s) for place in self._places))
        for place in self._places:
            place.worker.is_said_to_serve = True  # the first of all are not news

    async def keep(self) -> NoReturn:
        """Let the workers serve, replace those that fail, and follow ``target``. ``JobFailed``: one did too often."""
        try:
            while True:
                self._changed.clear()
                self._reconcile()
                tasks = [place.task for place in self._places if place.task is not None]
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait({changed, *tasks}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                for place in [p for p in self._places if p.task is not None and p.task.done()]:
                    self._places.remove(place)
                    place.task.result()  # type: ignore[union-attr]
        finally:
            await cancelled(*(place.task for place in self._places if place.task is not None))

    async def stop(self) -> None:
        """Ask every worker to end its engine; those that do not answer in time are left to the end of Ray."""
        stops = (place.worker.component.ask("stop", within_s=STOP_TIMEOUT_S) for place in self._places)
        await asyncio.gather(*stops, return_exceptions=True)

    @property
    def target(self) -> int:
        """Workers that the run should have."""
        return sum(self._targets.values())

    @property
    def components(self) -> list[Component]:
        """Who fills the places, in their order."""
        return [place.worker.component for place in self._places]

    # What people ask for

    def scale(self, workers: int, *, pool: str | None = None) -> None:
        """Have so many workers from now on, in all or of one pool; ``keep`` sees to it.

        In all, those who are missing come to the first pool, and those too many go from the last ones. ``ConfigError``
        for fewer than one in all, and for a pool that is none.
        """
        if pool is not None and pool not in self._targets:
            pools = ", ".join(filter(None, self._targets)) or "none: the run has no rollout.pools"
            raise ConfigError(f"no pool is called {pool}; there are {pools}")
        targets = {**self._targets, pool: workers} if pool is not None else _spread(self._targets, workers)
        if sum(targets.values()) < 1:
            raise ConfigError(f"cannot scale to {workers} rollout workers: the learner would wait forever; at least 1")
        if self._fixed:
            raise ConfigError(f"cannot scale to {workers} rollout workers: {self._fixed}")
        self._targets = targets
        self._changed.set()

    def _lower(self, pool: str) -> None:
        """One worker of the pool fewer, as long as one is left; a smaller target may not have been kept yet."""
        if self.target > 1:
            self._targets[pool] = max(self._targets[pool] - 1, 0)

    def drain(self, name: str) -> str:
        """Let a worker finish its groups and go, or all workers of a node (its id or host) and their like elsewhere.

        Returns a sentence that says what happens. ``ConfigError`` if nobody is called so.
        """
        if self._fixed:
            raise ConfigError(f"cannot drain {name}: {self._fixed}")
        named = [place for place in self._places if place.worker.name == name and not place.is_leaving]
        if named:
            if self.target == 1:
                raise ConfigError(f"{name} is the only rollout worker: scale up first, or stop the run")
            self._lower(named[0].pool)
            self._leave(named[0])
            return f"{name} finishes its groups and goes; {self.target} remain"
        there = [p for p in self._places if name in (p.worker.node_id, p.worker.host) and name]
        if not there:
            known = ", ".join(place.worker.name for place in self._places)
            hosts = ", ".join(sorted({place.worker.host for place in self._places if place.worker.host}))
            raise ConfigError(f"no rollout worker or node is called {name}; workers: {known}; nodes: {hosts}")
        self._closed_nodes |= {place.worker.node_id for place in there}
        for place in there:
            self._leave(place)
        return f"{', '.join(p.worker.name for p in there)} leave node {name}; others take their place elsewhere"

    # What the run asks for

    async def stats(self) -> list[RolloutStats]:
        """What every worker that has served did so far. One that does not answer at once is told of as last heard."""
        asked = [place.worker.hear() for place in self._places if place.has_served and place.worker.answers]
        if asked:
            await asyncio.wait(asked, timeout=STATS_S)
        for place in self._places:
            place.worker.answers = not place.worker.is_asked
        return [stats for place in self._places if (stats := place.worker.take_stats()) is not None]

    @property
    def num_serving(self) -> int:
        """Workers that have spoken of proven weights, and stay."""
        return sum(p.worker.state == SERVING and p.worker.has_weights and not p.is_leaving for p in self._places)

    def status(self) -> list[ComponentStatus]:
        """Every worker, as it was when it last spoke."""
        return [
            place.worker.status(restarts=self._restarts.count(place.role), is_leaving=place.is_leaving)
            for place in self._places
        ]

    async def evaluate(self, *, version: int) -> Evaluation:
        """Evaluate the weights of ``version`` on a worker that serves, or on another if that one fails."""
        for left in reversed(range(TRIES)):
            worker = await self._serving()
            try:
                return await worker.component.ask(
                    "evaluate",
                    version=version,
                    num_prompts=self._eval_prompts,
                    timeout_s=self._start_timeout_s,
                    within_s=EVALUATION_TIMEOUT_S,
                )
            except JobFailed as failure:
                if failure.is_final or left == 0:
                    raise
                self._note(f"{failure}; evaluating again, on another worker")
                worker.state = STARTING  # whatever it was doing, it is not asked again
        raise AssertionError("the last try returns or raises")

    # One place

    async def _tend(self, place: Place) -> None:
        """Whoever fills the place serves; who fails is replaced. Returns once the last one has been drained."""
        while True:
            try:
                if place.worker.state == STARTING and not place.worker.is_up:
                    await self._start(place, within_s=None)
                await self._serve(place)
                break
            except JobFailed as failure:
                if await self._give_up(place, failure):
                    break
        await self._end(place.worker)

    async def _start(self, place: Place, *, within_s: float | None) -> None:
        """Place the worker, which may wait for a machine, and start its engine, which may not wait."""
        worker = place.worker
        async with asyncio.timeout(within_s) as limit:
            try:
                await self._launcher.find(worker)
                worker.say("starting its engine")
                await worker.component.ask("start", within_s=self._start_timeout_s, **self._launcher.arguments(worker))
                await self._launcher.find(worker)  # with the engine's processes
            except TimeoutError:
                assert limit.expired()
                raise ComponentSilent(f"{worker.name} was not up within {within_s:g} s: {worker.doing}") from None
        worker.is_up = True

    async def _serve(self, place: Place) -> None:
        """Returns once the worker was drained; whatever else ends its service is a ``JobFailed``."""
        worker = place.worker
        worker.state, place.has_served = SERVING, True
        works = [asyncio.create_task(work) for work in (worker.run(), self._listen(worker))]
        try:
            await asyncio.wait(works, return_when=asyncio.FIRST_COMPLETED)
            for work in works:
                if work.done():
                    work.result()
        finally:
            await cancelled(*works)
        if not place.is_leaving:
            raise JobFailed(f"{worker.name} ended without being asked to")

    async def _listen(self, worker: Worker) -> NoReturn:
        """Hear from the worker again and again. ``ComponentSilent`` if it says nothing for too long."""
        while True:
            heard = worker.hear()
            await asyncio.wait({heard}, timeout=self._silent_s)
            if not heard.done():
                raise ComponentSilent(f"{worker.name} has not answered for {self._silent_s:g} s")
            heard.result()
            worker.answers = True
            if worker.has_weights and not worker.is_said_to_serve:
                self._note(f"{worker.name} serves, {time.monotonic() - worker.born_s:.0f} s after it was launched")
                worker.is_said_to_serve = True
            await asyncio.sleep(HEARTBEAT_S)

    async def _give_up(self, place: Place, failure: JobFailed) -> bool:
        """End who fills the place, and launch another. True if nobody is to fill it any more.

        Raises what ends the run: a failure too many, or one that would come again.
        """
        old = place.worker
        began_s = time.monotonic()
        ended = asyncio.create_task(self._end(old, is_lost=isinstance(failure, ComponentLost)))
        try:
            if place.is_leaving:
                return True
            if self._fixed:
                raise FailedForGood(f"{failure}; {self._fixed}")
            # A worker may fail by somebody else's end, such as that of the weight board.
            remedy = "replacing it" if str(failure).startswith(old.name) else f"replacing {old.name}"
            is_expected = place.pool in self._spot and isinstance(failure, ComponentLost)
            try:
                pause_s = self._restarts.begin(
                    place.role, failure, role="rollout", remedy=remedy, is_expected=is_expected
                )
            except FailedForGood as good:
                if place.has_served or len(self._places) <= 1:
                    raise
                self._lower(place.pool)
                self._note(f"{old.name}, which was added, does not start: {good}; the run goes on with {self.target}")
                return True
        finally:
            await ended
        await asyncio.sleep(max(pause_s - (time.monotonic() - began_s), 0.0))
        place.worker = self._launch(place.pool)
        place.worker.last_error = str(failure)
        return False

    async def _end(self, worker: Worker, *, is_lost: bool = False) -> None:
        """Let go of all that a worker holds; its processes are gone when this returns."""
        worker.close()
        if not is_lost:
            with suppress(JobFailed):
                await worker.component.ask("stop", within_s=STOP_TIMEOUT_S)
        await self._launcher.end(worker)
        with suppress(JobFailed):  # whoever watches the replay store says so
            await self._replay.ask("release_worker", worker=worker.name)

    def _reconcile(self) -> None:
        """As many places as wanted: new ones, or the newest go."""
        for pool, target in self._targets.items():
            staying = [place for place in self._places if place.pool == pool and not place.is_leaving]
            for _ in range(target - len(staying)):
                self._places.append(self._new_place(pool))
            for place in staying[target:]:
                self._leave(place)
        for place in self._places:
            if place.task is None:
                place.task = asyncio.create_task(self._tend(place))

    def _leave(self, place: Place) -> None:
        place.is_leaving = True
        worker = place.worker
        if worker.state == SERVING:
            worker.state = DRAINING
            worker.drain()
        elif place.task is not None:
            place.task.cancel()
            place.task = asyncio.create_task(self._end(worker))
        self._changed.set()

    async def _serving(self) -> Worker:
        """A worker that serves; waits for one."""
        while True:
            for place in self._places:
                if place.worker.state == SERVING and not place.is_leaving:
                    return place.worker
            await asyncio.sleep(HEARTBEAT_S / 4)

    def _new_place(self, pool: str) -> Place:
        place = Place(self._num_places, self._launch(pool))
        self._num_places += 1
        return place

    def _launch(self, pool: str) -> Worker:
        name, closed = f"rollout-{self._num_launched}", frozenset(self._closed_nodes)
        worker = self._launcher.launch(name, pool=pool, without=closed)
        self._num_launched += 1
        return worker


def _spread(targets: Mapping[str, int], workers: int) -> dict[str, int]:
    """The targets with ``workers`` in all: more in the first pool, or fewer in the last ones."""
    spread, change = dict(targets), workers - sum(targets.values())
    if change > 0:
        spread[next(iter(spread))] += change
    for pool in reversed(spread):
        fewer = min(spread[pool], max(-change, 0))
        spread[pool] -= fewer
        change += fewer
    return spread
