"""A fleet of workers that are no processes: they serve until they are told to die, hang, fail or finish."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r2vpo.job.component import Component
from r2vpo.job.config import SupervisorConfig
from r2vpo.job.crew import Worker
from r2vpo.job.errorlog import ErrorLog
from r2vpo.job.fleet import Fleet
from r2vpo.job.restarts import Restarts
from r2vpo.records import Evaluation, RolloutStats
from tests.job.fakes import Served, remote


class FakeWorker:
    """What of ``RolloutActor`` the fleet calls."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.can_start = asyncio.Event()
        self.can_start.set()
        self.start_error: Exception | None = None
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.silent = False
        self.finished = asyncio.Event()
        self.evaluation_error: Exception | None = None
        self.tokens = 0

    async def start(self, **_: Any) -> None:
        await self.can_start.wait()
        if self.start_error is not None:
            raise remote(self.start_error)

    async def run(self) -> None:
        done = asyncio.ensure_future(self.finished.wait())
        await asyncio.wait({done, self.failure}, return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        if self.failure.done():
            self.failure.result()

    async def drain(self) -> None:
        self.finished.set()

    async def stop(self) -> None:
        self.finished.set()

    async def stats(self) -> RolloutStats:
        if self.silent:
            await asyncio.Event().wait()
        return RolloutStats(
            worker=self.name,
            version=3,
            groups=1,
            trajectories=8,
            tokens=self.tokens,
            busy_s=1.0,
            alive_s=2.0,
            in_flight=2,
            waits_for="",
            new_syncs=(),
        )

    async def evaluate(self, *, version: int, num_prompts: int, timeout_s: float) -> Evaluation:
        if self.evaluation_error is not None:
            raise remote(self.evaluation_error)
        return Evaluation(version=version, accuracy=0.5, greedy_accuracy=0.75, num_prompts=num_prompts)

    def fail(self, error: Exception) -> None:
        """``run`` raises the error, as it arrives from another process."""
        self.failure.set_exception(remote(error))


class FakeStore:
    """What of ``ReplayService`` the fleet calls."""

    def __init__(self) -> None:
        self.released: list[str] = []

    async def release_worker(self, *, worker: str) -> None:
        self.released.append(worker)


class FakeLauncher:
    """Makes workers; ``prepare`` is given each before it is started."""

    def __init__(self) -> None:
        self.made: dict[str, FakeWorker] = {}
        self.actors: dict[str, Served] = {}
        self.excluded: dict[str, frozenset[str]] = {}
        self.ended: list[str] = []
        self.prepare: Callable[[FakeWorker], None] = lambda worker: None

    def arguments(self, worker: Worker) -> dict[str, Any]:
        return {}

    def launch(self, name: str, *, pool: str, without: frozenset[str]) -> Worker:
        self.made[name], self.excluded[name] = FakeWorker(name), without
        self.prepare(self.made[name])
        self.actors[name] = Served(self.made[name])
        return Worker(name, Component(name=name, actor=self.actors[name]), pool=pool)

    async def find(self, worker: Worker) -> None:
        await worker.component.ask("__ray_ready__")
        worker.node_id, worker.host = "n0", "here"

    async def end(self, worker: Worker) -> None:
        self.ended.append(worker.name)


class Yard:
    """A fleet with its fakes."""

    def __init__(
        self,
        folder: Path,
        *,
        workers: int = 2,
        max_restarts: int = 2,
        silent_s: float = 5.0,
        fixed: str = "",
        pools: dict[str, int] | None = None,
        spot: tuple[str, ...] = (),
    ) -> None:
        """``pools``: workers of each; without them all are alike."""
        self.launcher, self.store, self.notes = FakeLauncher(), FakeStore(), []
        self.now_s = 0.0
        self.fleet = Fleet(
            self.launcher,
            workers=pools or {"": workers},
            replay=Component(name="replay store", actor=Served(self.store)),
            restarts=Restarts(
                SupervisorConfig(backoff_s=0.0, max_restarts=max_restarts),
                note=self.notes.append,
                errors=ErrorLog(folder / "error.log"),
                clock=lambda: self.now_s,
            ),
            note=self.notes.append,
            eval_prompts=16,
            start_timeout_s=5.0,
            silent_s=silent_s,
            fixed=fixed,
            spot=spot,
        )

    async def start(self) -> asyncio.Task[Any]:
        """Start the fleet; returns the task that keeps it."""
        await self.fleet.start()
        keeping = asyncio.create_task(self.fleet.keep())
        await self.until_serving(self.fleet.target)
        return keeping

    def serving(self) -> list[str]:
        """Names of the workers that serve."""
        return [worker.name for worker in self.fleet.status() if worker.state == "serving"]

    async def until_serving(self, count: int) -> None:
        """Return once so many serve, and nobody else is there."""
        await until(lambda: len(self.serving()) == len(self.fleet.status()) == count)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)
