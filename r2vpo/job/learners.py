"""The learner group as the driver sees it: all ranks as one object, and the board on which they publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from learner.actor import BoardActor, LearnerActor
from r2vpo.job.cluster import Cluster
from r2vpo.job.component import Component, together
from r2vpo.job.config import RunConfig
from r2vpo.records import BatchSource
from rollout.tasks.factory import make_task

START_TIMEOUT_S = 600.0
"""Longest time for the ranks to be placed, and again to meet and to load the model (seconds)."""


class Learners:
    """Every call goes to all ranks at once; the answer is rank 0's. A rank that fails or dies fails the call."""

    def __init__(self, config: RunConfig, cluster: Cluster, *, model_path: str, logs: Path) -> None:
        self._timeout_s = config.learner.step_timeout_s
        self.board = Component(name="weight board", actor=BoardActor.remote())
        """Where rollout workers find the weights."""
        environment = {"OMP_NUM_THREADS": str(config.learner.omp_threads), "TOKENIZERS_PARALLELISM": "false"}
        if not cluster.on_gpu:
            environment["DS_ACCELERATOR"] = "cpu"
        options = cluster.options(config.learner.num_cpus, config.learner.num_gpus)
        make = LearnerActor.options(**options, runtime_env={"env_vars": environment})
        settings = {
            "config": config.learner,
            "algorithm": config.algorithm,
            "model_path": model_path,
            "temperature": config.rollout.temperature,
            "max_lag": config.replay.max_lag,
            "max_replay_lag": config.replay.max_replay_lag,
            "off_policy": config.off_policy,
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
        return await self._all("start", address, port, within_s=START_TIMEOUT_S)

    async def publish(self) -> None:
        """Put the current weights into the object store and name them on the board."""
        manifest, refs = await self._all("publish")
        await self.board.ask("post", manifest, refs)

    async def train_step(self, batch: BatchSource) -> dict[str, float]:
        """One learner step on what every rank fetches for itself; returns its metrics."""
        return await self._all("train_step", batch)

    async def save(self, directory: Path) -> None:
        """Write a checkpoint of the current version below ``directory``."""
        await self._all("save", str(directory))

    async def load(self, checkpoint: Path) -> int:
        """Continue from a checkpoint; returns its step."""
        return await self._all("load", str(checkpoint))

    async def export(self, directory: Path) -> None:
        """Write the model in Hugging Face format, in place of one that is there already."""
        await self._all("export", str(directory))

    async def _all(self, method: str, *arguments: Any, within_s: float | None = None) -> Any:
        within_s = within_s or self._timeout_s
        return (await together(*(rank.ask(method, *arguments, within_s=within_s) for rank in self.ranks)))[0]
