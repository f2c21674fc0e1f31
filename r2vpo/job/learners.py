"""The learner group as the driver sees it: all ranks as one object, and the board on which they publish."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import ray

from learner.actor import BoardActor, LearnerActor
from r2vpo.job.cluster import Cluster
from r2vpo.job.config import RunConfig
from r2vpo.records import SampledBatch

START_TIMEOUT_S = 600.0


class Learners:
    """Every call goes to all ranks at once; the answer is rank 0's. A dead rank fails the call."""

    def __init__(self, config: RunConfig, cluster: Cluster, *, model_path: str, logs: Path) -> None:
        self._timeout_s = config.learner.step_timeout_s
        self.board = BoardActor.remote()
        environment = {"OMP_NUM_THREADS": str(config.learner.omp_threads), "TOKENIZERS_PARALLELISM": "false"}
        if not cluster.on_gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        options = cluster.options(config.learner.num_cpus, config.learner.num_gpus)
        self._ranks = [
            LearnerActor.options(**options, runtime_env={"env_vars": environment}).remote(
                rank,
                config.learner.ranks,
                config=config.learner,
                algorithm=config.algorithm,
                model_path=model_path,
                temperature=config.rollout.temperature,
                max_lag=config.replay.max_lag,
                max_replay_lag=config.replay.max_replay_lag,
                off_policy=config.off_policy,
                exact_engine=not cluster.on_gpu,
                seed=config.seed,
                log_path=str(logs / f"learner-{rank}.log"),
            )
            for rank in range(config.learner.ranks)
        ]

    async def start(self) -> dict[str, Any]:
        """Form the process group and build the engines; returns what rank 0 says of itself."""
        address, port = await asyncio.wait_for(self._ranks[0].address.remote(), START_TIMEOUT_S)
        return await self._all("start", START_TIMEOUT_S, address, port)

    async def publish(self) -> None:
        """Put the current weights into the object store and name them on the board."""
        manifest, refs = await self._all("publish", self._timeout_s)
        await self.board.post.remote(manifest, refs)

    async def train_step(self, batch: SampledBatch) -> dict[str, float]:
        """One learner step; returns its metrics."""
        # One copy in the object store for all ranks.
        return await self._all("train_step", self._timeout_s, ray.put(batch))

    async def save(self, directory: Path) -> None:
        """Write a checkpoint of the current version below ``directory``."""
        await self._all("save", self._timeout_s, str(directory))

    async def load(self, checkpoint: Path) -> int:
        """Continue from a checkpoint; returns its step."""
        return await self._all("load", self._timeout_s, str(checkpoint))

    async def export(self, directory: Path) -> None:
        """Write the model in Hugging Face format."""
        await self._all("export", self._timeout_s, str(directory))

    async def _all(self, method: str, timeout_s: float, *arguments: Any) -> Any:
        refs = [getattr(rank, method).remote(*arguments) for rank in self._ranks]
        try:
            answers = await asyncio.wait_for(asyncio.gather(*refs), timeout_s)
        except TimeoutError:
            raise TimeoutError(f"the learner group did not finish {method} within {timeout_s:g} s") from None
        return answers[0]
