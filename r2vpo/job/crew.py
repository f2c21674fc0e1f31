"""One rollout worker as the driver sees it, and where it is made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from r2vpo.job.cluster import Cluster
from r2vpo.job.component import Component
from r2vpo.job.config import RunConfig
from r2vpo.job.links import ReplayLink, WeightLink
from r2vpo.job.processes import Families, host_of
from r2vpo.job.status import ComponentStatus
from r2vpo.records import NO_VERSION, RolloutStats, SyncRecord
from rollout.actor import RolloutActor
from rollout.environment import engine_environment

STARTING, SERVING, DRAINING = "starting", "serving", "draining"
TOLERANCE_EXACT = 1e-4
"""Largest canary gap (nats) where engine and learner both compute in float32."""
TOLERANCE_HALF = 5e-2
"""Largest canary gap (nats) where one of them computes in bfloat16."""


class Worker:
    """A rollout worker and what was last heard of it."""

    def __init__(self, name: str, component: Component, *, pool: str = "") -> None:
        self.name = name
        self.pool = pool
        self.component = component
        self.state, self.doing, self.since_s = STARTING, "waiting for a machine", time.time()
        self.is_up = False
        """Whether its engine has started."""
        self.born_s = time.monotonic()
        self.is_said_to_serve = False
        """Whether people know that it has proven weights."""
        self.answers = True
        """False while a question of `hear` waits longer than it should."""
        self.node_id = self.host = ""
        self.last_error = ""
        """How the one before it in its place ended."""
        self._heard: RolloutStats | None = None
        self._new_syncs: list[SyncRecord] = []
        self._asking: asyncio.Task[None] | None = None
        self._drains: asyncio.Task[None] | None = None

    @property
    def is_asked(self) -> bool:
        """Whether a question waits for its answer."""
        return self._asking is not None and not self._asking.done()

    def say(self, doing: str) -> None:
        """What it does, for people."""
        if doing != self.doing:
            self.doing, self.since_s = doing, time.time()

    async def run(self) -> None:
        """Let it serve; returns when it ends. ``JobFailed`` if it fails."""
        await self.component.ask("run", within_s=None)

    def drain(self) -> None:
        """Ask it to finish; whether it hears is seen by the end of `run`, and whether it lives by `hear`."""
        self.say("finishing its groups")
        self._drains = asyncio.create_task(self.component.ask("drain"))
        self._drains.add_done_callback(lambda task: task.cancelled() or task.exception())

    def hear(self) -> asyncio.Task[None]:
        """Ask what it did; a question that waits for its answer is not asked twice. Its errors are those of ``ask``."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._hear())
            self._asking.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._asking

    @property
    def has_weights(self) -> bool:
        """Whether it has spoken of proven weights."""
        return self._heard is not None and self._heard.version != NO_VERSION

    def take_stats(self) -> RolloutStats | None:
        """What was last heard, each sync once; None before the first word."""
        if self._heard is None:
            return None
        syncs, self._new_syncs = tuple(self._new_syncs), []
        return replace(self._heard, new_syncs=syncs)

    def status(self, *, restarts: int, is_leaving: bool) -> ComponentStatus:
        """As a line of ``r2vpo status``; ``restarts`` are those of its place."""
        heard = self._heard
        return ComponentStatus(
            name=self.name,
            role="rollout",
            state=DRAINING if is_leaving else self.state,
            doing=self.doing,
            since_s=self.since_s,
            restarts=restarts,
            last_error=self.last_error,
            version=heard.version if heard and self.has_weights else None,
            in_flight=heard.in_flight if heard else None,
            node=self.host,
            node_id=self.node_id,
            pool=self.pool,
        )

    def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()

    async def _hear(self) -> None:
        heard = await self.component.ask("stats", within_s=None)
        self._heard = heard
        self._new_syncs += heard.new_syncs
        if self.state == SERVING:
            self.say(heard.waits_for or f"generating {heard.in_flight} groups")


class Launcher(Protocol):
    """Where rollout workers are made, and ended."""

    def arguments(self, worker: Worker) -> Mapping[str, Any]:
        """What ``RolloutActor.start`` takes."""
        ...

    def launch(self, name: str, *, pool: str, without: frozenset[str]) -> Worker:
        """A new actor of a pool, on none of the nodes ``without``; it may wait long for its place."""
        ...

    async def find(self, worker: Worker) -> None:
        """Learn where it is, and which processes are its own; waits until it has a machine. ``JobFailed``: it died."""
        ...

    async def end(self, worker: Worker) -> None:
        """End its processes."""
        ...


class RayLauncher:
    """Rollout actors in the Ray cluster that this process is connected to."""

    def __init__(
        self, config: RunConfig, cluster: Cluster, *, model_path: str, replay: ReplayLink, board: Component, logs: Path
    ) -> None:
        environment = engine_environment(config.rollout, on_gpu=cluster.on_gpu)
        if cluster.home is not None:
            environment["VLLM_RPC_BASE_PATH"] = str(cluster.home)  # the sockets of a killed engine go with the folder
        self._pools = config.rollout.by_pool
        self._options = {
            name: {
                **cluster.options(
                    pool.num_cpus, pool.num_gpus, gpus_each=pool.tensor_parallel_size, resources=pool.resources
                ),
                "runtime_env": {"env_vars": environment},
            }
            for name, pool in self._pools.items()
        }
        self._logs = logs
        self._arguments: Mapping[str, Any] = {
            "task": config.task,
            "seed": config.seed,
            "model_path": model_path,
            "trust_remote_code": config.model.trust_remote_code,
            "on_gpu": cluster.on_gpu,
            "tolerance": TOLERANCE_EXACT if cluster.is_exact(config) else TOLERANCE_HALF,
            "prompts": replay,
            "groups": replay,
            "weights": WeightLink(board),
            "probe_every_s": config.supervisor.probe_every_s,
            "silent_s": config.supervisor.silent_s,
            "transport": config.learner.weight_transport,
        }
        self._families = Families()

    def arguments(self, worker: Worker) -> Mapping[str, Any]:
        """See ``Launcher.arguments``."""
        return {**self._arguments, "config": self._pools[worker.pool]}

    def launch(self, name: str, *, pool: str, without: frozenset[str]) -> Worker:
        """See ``Launcher.launch``."""
        labels = dict(self._pools[pool].labels)
        if without:
            labels["ray.io/node-id"] = f"!in({','.join(sorted(without))})"
        log = self._logs / f"{name}.log"
        where = {"label_selector": labels} if labels else {}
        actor = RolloutActor.options(**self._options[pool], **where).remote(name, log_path=str(log))
        return Worker(name, Component(name=name, actor=actor, log=log), pool=pool)

    async def find(self, worker: Worker) -> None:
        """See ``Launcher.find``."""
        worker.node_id = (await self._families.find(worker.component, within_s=None)).node_id
        worker.host = host_of(worker.node_id)

    async def end(self, worker: Worker) -> None:
        """See ``Launcher.end``."""
        await self._families.end(worker.component)
