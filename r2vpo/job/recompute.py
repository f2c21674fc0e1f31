"""Computes learner steps again with a learner group of their own, in a Ray session that leaves nothing behind.

    StepPlan ─┐                  ┌─ load(checkpoint)
    batches ──┴─▶ Learners ──────┴─ train_step … ──▶ metrics of every step

The actors are those of a run, so the arithmetic is, too: same ranks, threads, micro-batches, optimiser. The folder of
the run is only read.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from learner.checkpoint import final_path
from r2vpo.job.cluster import Cluster, close_cluster, open_cluster
from r2vpo.job.component import plain_message, until_stop
from r2vpo.job.config import RunConfig
from r2vpo.job.differences import COARSE_ROUNDING, EXACT_ROUNDING
from r2vpo.job.errorlog import ErrorLog
from r2vpo.job.learners import Learners, make_board
from r2vpo.job.reaper import Reaper
from r2vpo.job.settings import ConfigError
from r2vpo.job.signals import StopRequest
from r2vpo.job.step_plan import StepPlan
from r2vpo.records import SampledBatch
from rollout.config import TaskConfig

SCRATCH_PREFIX = "r2vpo-step-"
ERRORS = (ValueError, RuntimeError, TimeoutError, OSError, LookupError, RayError)
"""What a recomputation may fail with. Anything else is a programming error and keeps its traceback."""


class Progress(Protocol):
    """Who is told how far it is."""

    def phase(self, text: str) -> None:
        """A part begins, such as ``1 learner rank``."""
        ...

    def step(self, step: int, *, done: int, total: int) -> None:
        """The batch of ``step`` is being trained; ``done`` of ``total`` steps are behind."""
        ...


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """What came of it."""

    metrics: dict[int, dict[str, Any]]
    """The learner's metrics by step."""
    rounding: float
    """Largest relative difference from the recorded ones that counts as the same, given type and device."""


@dataclass(frozen=True, kw_only=True)
class PlacedBatch:
    """A batch in the object store, as a ``BatchSource`` for all ranks of the node."""

    reference: ray.ObjectRef

    def fetch(self) -> SampledBatch:
        """See ``BatchSource.fetch``."""
        return ray.get(self.reference)


def recompute(plan: StepPlan, batch_of: Callable[[int], SampledBatch], *, progress: Progress) -> Recomputed | None:
    """Compute every step of ``plan``; None if a signal asked to stop. ``batch_of`` gives the batch of a step.

    ``ConfigError`` if it cannot be done, with the folder that says why.
    """
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH_PREFIX))
    reaper = Reaper(scratch)
    failed = True
    try:
        result = asyncio.run(_Recomputation(plan, batch_of, scratch, progress).run())
        failed = False
        return result
    except ERRORS as failure:
        ErrorLog(scratch / "error.log").add("the recomputation failed", failure)
        raise ConfigError(_reason(plan, failure, scratch)) from failure
    finally:
        close_cluster(scratch, keep_logs=failed)
        reaper.close()
        if not failed:
            shutil.rmtree(scratch, ignore_errors=True)


class _Recomputation:
    def __init__(
        self, plan: StepPlan, batch_of: Callable[[int], SampledBatch], scratch: Path, progress: Progress
    ) -> None:
        self._plan, self._batch_of, self._scratch, self._progress = plan, batch_of, scratch, progress
        self._metrics: dict[int, dict[str, Any]] = {}
        self._rounding = EXACT_ROUNDING

    async def run(self) -> Recomputed | None:
        with StopRequest() as stop:
            self._progress.phase("Ray")
            cluster = open_cluster(_alone(self._plan.segments[0].config), self._scratch)
            stop.take_over()
            await until_stop(self._segments(cluster), stop.wait)
            return None if stop.is_set else Recomputed(metrics=self._metrics, rounding=self._rounding)

    async def _segments(self, cluster: Cluster) -> None:
        checkpoint = self._plan.checkpoint
        for segment in self._plan.segments:
            config = _alone(segment.config)
            ranks = config.learner.ranks
            self._progress.phase(f"{ranks} learner rank{'' if ranks == 1 else 's'} from {self._plan.origin}")
            learners = Learners(config, cluster, board=make_board(), model_path=config.model.path, logs=self._scratch)
            started = await learners.start()
            if cluster.on_gpu or started["dtype"] != "float32":
                self._rounding = COARSE_ROUNDING
            if checkpoint is not None:
                await learners.load(checkpoint.resolve())
            for step in segment.steps:
                await self._step(learners, step)
            if segment is not self._plan.segments[-1]:
                checkpoint = await self._hand_over(learners, segment.steps.stop)

    async def _step(self, learners: Learners, step: int) -> None:
        self._progress.step(step, done=len(self._metrics), total=len(self._plan.steps))
        batch = PlacedBatch(reference=ray.put(self._batch_of(step)))
        self._metrics[step] = await learners.train_step(batch)

    async def _hand_over(self, learners: Learners, step: int) -> Path:
        """End a learner group; the next one, with other settings, goes on from the checkpoint that is returned."""
        await learners.save(self._scratch / "checkpoints")
        await learners.end()
        return final_path(self._scratch / "checkpoints", step)


def _alone(config: RunConfig) -> RunConfig:
    """The settings of a learner group without rollout workers, which needs nothing of the task."""
    return replace(
        config,
        task=TaskConfig(),
        rollout=replace(config.rollout, workers=1, num_cpus=0.0, num_gpus=0.0),
    )


def _reason(plan: StepPlan, failure: BaseException, scratch: Path) -> str:
    return f"steps {plan.steps.start} to {plan.step} cannot be computed again: {plain_message(failure)} ({scratch})"
