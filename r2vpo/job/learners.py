"""The learner group as the driver sees it: all ranks as one object, and the board on which they publish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from learner.actor import BoardActor, LearnerActor
from learner.checkpoint import SaveFailed
from learner.errors import WeightsNotFinite
from r2vpo.job.cluster import Cluster
from r2vpo.job.component import Component, ComponentSilent, JobFailed, roll_call, together
from r2vpo.job.config import RunConfig
from r2vpo.job.links import MeetingLink
from r2vpo.job.processes import Families, host_of
from r2vpo.job.status import ComponentStatus
from r2vpo.records import BatchSource
from rollout.broadcast import NcclSender
from rollout.tasks.factory import make_task

START_TIMEOUT_S = 600.0
"""Longest time for the ranks to be placed, and again to meet and to load the model (seconds)."""
PULSE_S = 1.0
"""Between two looks at a rank (seconds)."""


class LearnersLost(JobFailed):
    """The group cannot go on, since a rank died, hangs or failed; another one can, from a checkpoint."""


def make_board() -> Component:
    """Where rollout workers find the weights; it outlives the learner groups.

    It is beside the driver: a node that is lost takes workers along, and not the board, without which all begin again.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Component(name="weight board", actor=BoardActor.options(scheduling_strategy=here).remote())


class Learners:
    """Every call goes to all ranks at once; the answer is rank 0's. `LearnersLost` if a rank fails, dies or hangs."""

    def __init__(
        self,
        config: RunConfig,
        cluster: Cluster,
        *,
        board: Component,
        model_path: str,
        logs: Path,
        lineage: int = 0,
    ) -> None:
        """``lineage``: how many groups there were before in this run."""
        self._timeout_s, self._silent_s = config.learner.step_timeout_s, config.supervisor.silent_s
        self._board, self._lineage = board, lineage
        self._families = Families()
        self._nodes: dict[str, tuple[str, str]] = {}  # of every rank: the node's id and host
        self._pulses: dict[str, dict[str, Any]] = {}
        self._publishes = config.learner.publishes
        environment = {"OMP_NUM_THREADS": str(config.learner.omp_threads), "TOKENIZERS_PARALLELISM": "false"}
        if not cluster.on_gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        options = cluster.options(config.learner.num_cpus, config.learner.num_gpus, resources=config.learner.resources)
        make = LearnerActor.options(**options, runtime_env={"env_vars": environment})
        settings = {
            "config": config.learner,
            "algorithm": config.algorithm,
            "model_path": model_path,
            "temperature": config.rollout.temperature,
            "max_lag": config.replay.max_lag,
            "max_replay_lag": config.replay.max_replay_lag,
            "exact_engine": cluster.is_exact(config),
            "seed": config.seed,
            "canary_text": make_task(config.task, seed=config.seed).eval_prompt(0).text,
        }
        self.ranks = [
            Component(
                name=f"learner-{rank}",
                actor=make.remote(rank, config.learner.ranks, **settings, log_path=str(log)),
                log=log,
            )
            for rank, log in ((rank, logs / f"learner-{rank}.log") for rank in range(config.learner.ranks))
        ]
        """One component per rank."""

    async def start(self) -> dict[str, Any]:
        """Form the process group and build the engines; returns what rank 0 says of itself."""
        address, port = await self.ranks[0].ask("address", within_s=START_TIMEOUT_S)
        for rank in self.ranks:
            family = await self._families.find(rank, within_s=START_TIMEOUT_S)
            self._nodes[rank.name] = family.node_id, host_of(family.node_id)
        return await self._all("start", address, port, within_s=START_TIMEOUT_S)

    async def watch(self) -> NoReturn:
        """Look at every rank, whatever it works on: `LearnersLost` once one is dead or says nothing any more."""
        await together(*(self._watch(rank) for rank in self.ranks))
        raise AssertionError("ranks are watched until the run ends")

    async def meet(self, workers: Sequence[Component], *, gpus_each: tuple[int, ...]) -> None:
        """Publish by broadcasts to exactly these workers, with so many GPUs each, from now on."""
        await self._all("open", NcclSender(gpus_each, MeetingLink(tuple(workers))))

    async def publish(self) -> None:
        """Hand out the current weights under the version that the board names.

        ``WeightsNotFinite`` if they are not fit to be used.
        """
        manifest, refs = await self._all("publish", passing=(WeightsNotFinite,))
        await self._board.ask("post", replace(manifest, lineage=self._lineage), refs)
        if not refs:
            await self._all("send")

    async def publish_due(self, version: int) -> None:
        """Publish the weights of ``version``, the current one, if ``learner.sync_every`` has come to it.

        Between two publications the workers go on with the older weights, whose lag counts.
        """
        if self._publishes(version):
            await self.publish()

    async def train_step(self, batch: BatchSource) -> dict[str, float]:
        """One learner step on what every rank fetches for itself; returns its metrics."""
        return await self._all("train_step", batch)

    async def save(self, directory: Path) -> None:
        """Write a checkpoint of the current version below ``directory``.

        ``SaveFailed`` if there is no room for it, ``WeightsNotFinite`` if it is not worth it.
        """
        await self._all("save", str(directory), passing=(SaveFailed, WeightsNotFinite))

    async def load(self, checkpoint: Path) -> int:
        """Continue from a checkpoint; returns its step."""
        return await self._all("load", str(checkpoint))

    async def export(self, directory: Path) -> None:
        """Write the model in Hugging Face format, in place of one that is there already."""
        await self._all("export", str(directory))

    async def end(self) -> None:
        """End all ranks at once, whatever they do."""
        await asyncio.gather(*(self._families.end(rank) for rank in self.ranks))

    def status(self, *, restarts: int, last_error: str) -> list[ComponentStatus]:
        """Every rank, as it was when it last answered."""
        return [self._status(rank, restarts, last_error) for rank in self.ranks]

    def _status(self, rank: Component, restarts: int, last_error: str) -> ComponentStatus:
        pulse = self._pulses.get(rank.name)
        node_id, host = self._nodes.get(rank.name, ("", ""))
        return ComponentStatus(
            name=rank.name,
            role="learner",
            state="serving" if pulse else "starting",
            doing=pulse["doing"] if pulse else "waiting for a machine, or loading the model",
            since_s=pulse["since_s"] if pulse else time.time(),
            restarts=restarts,
            last_error=last_error,
            node=host,
            node_id=node_id,
        )

    async def _watch(self, rank: Component) -> NoReturn:
        while True:
            try:
                self._pulses[rank.name] = await rank.ask("ping", within_s=self._silent_s)
            except ComponentSilent as silence:
                raise LearnersLost(f"{rank.name} has not answered for {self._silent_s:g} s") from silence
            except JobFailed as failure:
                raise LearnersLost(str(failure)) from failure
            await asyncio.sleep(PULSE_S)

    async def _all(
        self,
        method: str,
        *arguments: Any,
        within_s: float | None = None,
        passing: tuple[type[Exception], ...] = (),
    ) -> Any:
        within_s = within_s or self._timeout_s
        calls = (rank.ask(method, *arguments, within_s=within_s, passing=passing) for rank in self.ranks)
        try:
            return (await together(*calls))[0]
        except JobFailed as failure:
            # Whoever lost a partner may have spoken before the news of its death came.
            deaths = await roll_call(self.ranks)
            if not deaths and failure.is_final:
                raise
            raise LearnersLost("; ".join(map(str, deaths or [failure]))) from failure
