"""The rollout workers as the driver sees them: start, watch, ask, stop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from r2vpo.job.cluster import Cluster
from r2vpo.job.config import RunConfig
from r2vpo.job.links import ReplayLink, WeightLink
from r2vpo.records import Evaluation, RolloutStats
from rollout.actor import RolloutActor
from rollout.environment import engine_environment

STOP_TIMEOUT_S = 5.0
TOLERANCE_EXACT = 1e-4
"""Largest canary gap (nats) where engine and learner both compute in float32."""
TOLERANCE_HALF = 5e-2
"""Largest canary gap (nats) where one of them computes in bfloat16."""


class Fleet:
    """All rollout workers. They pull: nothing here hands them work."""

    def __init__(
        self, config: RunConfig, cluster: Cluster, *, model_path: str, replay: Any, board: Any, logs: Path
    ) -> None:
        self._config = config
        environment = engine_environment(config.rollout, on_gpu=cluster.on_gpu)
        options = cluster.options(
            config.rollout.num_cpus, config.rollout.num_gpus, gpus_each=config.rollout.tensor_parallel_size
        )
        self._arguments = {
            "config": config.rollout,
            "task": config.task,
            "seed": config.seed,
            "model_path": model_path,
            "trust_remote_code": config.model.trust_remote_code,
            "on_gpu": cluster.on_gpu,
            "tolerance": TOLERANCE_HALF if cluster.on_gpu else TOLERANCE_EXACT,
            "prompts": ReplayLink(replay),
            "groups": ReplayLink(replay),
            "weights": WeightLink(board),
        }
        self._workers = {
            name: RolloutActor.options(**options, runtime_env={"env_vars": environment}).remote(
                name, log_path=str(logs / f"{name}.log")
            )
            for name in (f"rollout-{i}" for i in range(config.rollout.workers))
        }

    async def start(self) -> None:
        """Start every engine. ``TimeoutError`` names the workers that are not up in time."""
        starts = {
            name: asyncio.ensure_future(worker.start.remote(**self._arguments))
            for name, worker in self._workers.items()
        }
        done, pending = await asyncio.wait(starts.values(), timeout=self._config.rollout.start_timeout_s)
        for start in done:
            start.result()
        if pending:
            late = ", ".join(name for name, start in starts.items() if start in pending)
            raise TimeoutError(
                f"{late} did not start within rollout.start_timeout_s={self._config.rollout.start_timeout_s:g}; "
                "their logs say how far they came"
            )

    def serve(self) -> dict[str, asyncio.Future[None]]:
        """Let every worker run; by name, a future that ends only when its worker stops or fails."""
        return {name: asyncio.ensure_future(worker.run.remote()) for name, worker in self._workers.items()}

    async def evaluate(self, *, version: int) -> Evaluation:
        """Evaluate the weights of ``version`` on the first worker."""
        worker = next(iter(self._workers.values()))
        return await worker.evaluate.remote(
            version=version,
            num_prompts=self._config.task.eval_prompts,
            timeout_s=self._config.rollout.start_timeout_s,
        )

    async def stats(self) -> list[RolloutStats]:
        """What every worker did so far."""
        return list(await asyncio.gather(*(worker.stats.remote() for worker in self._workers.values())))

    async def stop(self) -> None:
        """Ask every worker to end its engine; those that do not answer in time are left to the end of Ray."""
        stops = [asyncio.ensure_future(worker.stop.remote()) for worker in self._workers.values()]
        await asyncio.wait(stops, timeout=STOP_TIMEOUT_S)
