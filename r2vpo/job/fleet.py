"""The rollout workers as the driver sees them: start, watch, ask, stop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

from r2vpo.job.cluster import Cluster
from r2vpo.job.component import Component, together
from r2vpo.job.config import RunConfig
from r2vpo.job.links import ReplayLink, WeightLink
from r2vpo.records import Evaluation, RolloutStats
from rollout.actor import RolloutActor
from rollout.environment import engine_environment

STOP_TIMEOUT_S = 10.0
"""Longest wait for the workers to end their engines (seconds)."""
EVALUATION_TIMEOUT_S = 3600.0
"""Longest time that an evaluation may take (seconds)."""
TOLERANCE_EXACT = 1e-4
"""Largest canary gap (nats) where engine and learner both compute in float32."""
TOLERANCE_HALF = 5e-2
"""Largest canary gap (nats) where one of them computes in bfloat16."""


class Fleet:
    """All rollout workers. They pull: nothing here hands them work."""

    def __init__(
        self, config: RunConfig, cluster: Cluster, *, model_path: str, replay: ReplayLink, board: Component, logs: Path
    ) -> None:
        self._config = config
        environment = engine_environment(config.rollout, on_gpu=cluster.on_gpu)
        if cluster.home is not None:
            environment["VLLM_RPC_BASE_PATH"] = str(cluster.home)  # the sockets of a killed engine go with the folder
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
            "tolerance": TOLERANCE_EXACT if cluster.is_exact(config) else TOLERANCE_HALF,
            "prompts": replay,
            "groups": replay,
            "weights": WeightLink(board),
        }
        make = RolloutActor.options(**options, runtime_env={"env_vars": environment})
        names = [f"rollout-{i}" for i in range(config.rollout.workers)]
        self.workers = [
            Component(name=name, actor=make.remote(name, log_path=str(log)), log=log)
            for name, log in ((name, logs / f"{name}.log") for name in names)
        ]
        """One component per worker."""

    async def start(self) -> None:
        """Start every engine; the first that fails, or is not up within ``rollout.start_timeout_s``, is named."""
        timeout_s = self._config.rollout.start_timeout_s
        await together(*(w.ask("start", within_s=timeout_s, **self._arguments) for w in self.workers))

    def serve(self) -> list[asyncio.Task[NoReturn]]:
        """Let every worker run; a task that ends only when its worker stops or fails."""
        return [asyncio.create_task(worker.serve("run")) for worker in self.workers]

    async def evaluate(self, *, version: int) -> Evaluation:
        """Evaluate the weights of ``version`` on the first worker."""
        return await self.workers[0].ask(
            "evaluate",
            version=version,
            num_prompts=self._config.task.eval_prompts,
            timeout_s=self._config.rollout.start_timeout_s,
            within_s=EVALUATION_TIMEOUT_S,
        )

    async def stats(self) -> list[RolloutStats]:
        """What every worker did so far."""
        return await together(*(worker.ask("stats") for worker in self.workers))

    async def stop(self) -> None:
        """Ask every worker to end its engine; those that do not answer in time are left to the end of Ray."""
        await asyncio.gather(*(w.ask("stop", within_s=STOP_TIMEOUT_S) for w in self.workers), return_exceptions=True)
