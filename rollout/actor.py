"""The Ray shell of a rollout worker: builds engine, task, tokenizer and rewards, and forwards to `worker.py`."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from r2vpo.logfile import redirect_output
from r2vpo.records import Evaluation, GroupSink, PromptSource, RolloutStats, WeightSource
from rollout.config import RolloutConfig, TaskConfig
from rollout.delivery import make_delivery
from rollout.rewards import RewardPool
from rollout.sync import WeightSync
from rollout.tasks.factory import make_task
from rollout.tokenize import make_tokenize
from rollout.worker import RolloutWorker

STOP_S = 3.0
"""Longest wait for a stopping worker to let go of its work (seconds)."""


@ray.remote(max_restarts=0)
class RolloutActor:
    """One rollout worker. ``start`` once, then ``run`` as a call that lasts as long as the worker serves."""

    def __init__(self, name: str, *, log_path: str) -> None:
        redirect_output(Path(log_path))
        self._name = name
        self._worker: RolloutWorker | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(
        self,
        *,
        config: RolloutConfig,
        task: TaskConfig,
        seed: int,
        model_path: str,
        trust_remote_code: bool,
        on_gpu: bool,
        tolerance: float,
        prompts: PromptSource,
        groups: GroupSink,
        weights: WeightSource,
        probe_every_s: float,
        silent_s: float,
        transport: str,
    ) -> None:
        """Start the engine; it serves its first prompt only after its first verified sync.

        ``probe_every_s``, ``silent_s``: see ``RolloutWorker``; ``transport``: ``learner.weight_transport``.
        """
        # Imported here: vLLM must see the environment that Ray gave this process, and importing it takes seconds.
        engine_module = importlib.import_module("rollout.engine")
        tokenize = make_tokenize(model_path, chat=task.chat, trust_remote_code=trust_remote_code)
        the_task = make_task(task, seed=seed)
        rewards = RewardPool(
            task.reward or the_task.reward,
            processes=task.reward_processes,
            deadline_s=task.reward_deadline_s,
            memory_mb=task.reward_memory_mb,
        )
        await rewards.start()
        engine = await engine_module.RolloutEngine.start(
            config,
            model_path=model_path,
            on_gpu=on_gpu,
            trust_remote_code=trust_remote_code,
            transport=transport,
        )
        self._engine, self._rewards = engine, rewards
        self._worker = RolloutWorker(
            self._name,
            config=config,
            seed=seed,
            engine=engine,
            task=the_task,
            tokenize=tokenize,
            rewards=rewards,
            prompts=prompts,
            groups=groups,
            weights=weights,
            sync=WeightSync(engine, worker=self._name, tolerance=tolerance, delivery=make_delivery(transport)),
            probe_every_s=probe_every_s,
            silent_s=silent_s,
        )

    async def connect(self, init_info: Mapping[str, Any]) -> None:
        """See ``RolloutEngine.connect``."""
        self._started()
        await self._engine.connect(init_info)

    async def run(self) -> None:
        """Serve until ``stop``, or until it is drained; raises what a component raised."""
        self._idle.clear()
        try:
            await self._started().run()
        finally:
            self._idle.set()

    async def drain(self) -> None:
        """Take no further lease; ``run`` returns once the last group is finished."""
        self._started().drain()

    async def stop(self) -> None:
        """Return all leases, let ``run`` end, and end the engine's and the rewards' processes."""
        if self._worker is not None:
            self._worker.stop()
            # An engine that is paused or at work takes seconds to end.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), STOP_S)
            self._engine.shutdown()
            self._rewards.close()

    async def evaluate(self, *, version: int, num_prompts: int, timeout_s: float) -> Evaluation:
        """See ``RolloutWorker.evaluate``."""
        return await self._started().evaluate(version=version, num_prompts=num_prompts, timeout_s=timeout_s)

    async def stats(self) -> RolloutStats:
        """See ``RolloutWorker.stats``."""
        return self._started().stats()

    def _started(self) -> RolloutWorker:
        assert self._worker is not None, "start() first"
        return self._worker
