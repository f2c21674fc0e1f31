"""The driver: introduces the rooms to each other and runs the learner's loop.

                 lease                   append                   sample
    replay actor ─────▶ rollout workers ───────▶ replay actor ──────────▶ driver ──batch──▶ learner ranks
                              ▲                       ▲                     │                    │
                              └─── weight board ◀─────┼──── publish ────────┼────────────────────┘
                                                      └──── commit ─────────┘

The driver waits for two things only: the next batch (the store says what that waits for) and the learner's step. The
workers serve on their own; one that fails ends the run with its error, since nobody is left who would replace it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import ray

from learner.checkpoint import newest, read_state
from r2vpo.job.cluster import Cluster, open_cluster
from r2vpo.job.config import RunConfig
from r2vpo.job.fleet import Fleet
from r2vpo.job.learners import Learners
from r2vpo.job.measure import StepMeter
from r2vpo.job.rundir import RunDir
from r2vpo.job.signals import StopRequest
from r2vpo.job.summary import FAILED, FINISHED, INTERRUPTED, summarise
from r2vpo.job.tracking import Tracker, read_metrics
from r2vpo.job.view import View, make_view
from r2vpo.records import Evaluation, SampledBatch
from replay.actor import ReplayActor
from rollout.tasks.factory import make_task

SAMPLE_S = 1.0
"""Longest single wait for a batch (seconds); the driver looks around and asks again."""
STALL_S = 600.0
"""Seconds without a single new group after which the run ends, saying who waits for what."""
STOP_GRACE_S = 10.0
"""Seconds that a stopping run gives to the step it is in and to its last checkpoint."""


SATURATED_STEPS = 10
"""Learner steps with λ at its ceiling after which the run says so."""
EXIT_CODES = {FINISHED: 0, FAILED: 1, INTERRUPTED: 130}
EMPTY_STORE = {"version": 0, "groups": 0, "trajectories": 0, "sampled_tokens": 0, "outcomes": {}}
JOB_ERRORS = (ValueError, RuntimeError, TimeoutError, OSError, ray.exceptions.RayError)
"""What a component may fail with. Anything else is a programming error and keeps its traceback."""

T = TypeVar("T")


class JobFailed(RuntimeError):  # noqa: N818 - says what happened
    """A component failed and the run cannot go on; the message names it."""


def run_job(config: RunConfig, run: RunDir, *, resume: bool) -> int:
    """Run a job to its end and return the exit code: 0 finished, 1 failed, 130 interrupted."""
    with make_view(config, run.path) as view:
        return asyncio.run(Job(config, run, view).run(resume=resume))


class Job:
    """One run, from the first process to the last."""

    def __init__(self, config: RunConfig, run: RunDir, view: View) -> None:
        self._config = config
        self._run = run
        self._view = view
        self._meter = StepMeter()
        self._evaluations: dict[str, Evaluation] = {}
        self._next_step = 0
        self._saturated_steps = 0
        self._store: dict[str, Any] = dict(EMPTY_STORE)
        self._stop = StopRequest()

    async def run(self, *, resume: bool) -> int:
        """Start, train, leave everything in the run's folder, and end every process."""
        started_s = time.monotonic()
        error = ""
        with self._stop:
            checkpoint = newest(self._run.checkpoints) if resume else None
            self._next_step = read_state(checkpoint)["version"] if checkpoint else 0
            if resume:
                self._evaluations = earlier_evaluations(self._run)
            self._tracker = Tracker(self._config, self._run, resume_step=self._next_step, note=self._view.note)
            try:
                await self._live(checkpoint, resume)
                status = INTERRUPTED if self._stop.is_set else FINISHED
            except JOB_ERRORS as failure:
                status, error = FAILED, plain_message(failure)
            finally:
                self._view.phase("ending all processes")
                ray.shutdown()
                self._tracker.close()
        summary = summarise(
            self._config,
            steps=read_metrics(self._run.metrics),
            status=status,
            wall_s=time.monotonic() - started_s,
            evaluations=self._evaluations,
            store=self._store,
            syncs=self._meter.syncs,
        )
        self._run.write_summary(summary | ({"error": error} if error else {}))
        if error:
            self._view.note(error)
        self._view.finish(summary)
        return EXIT_CODES[status]

    async def _live(self, checkpoint: Path | None, resume: bool) -> None:
        """Everything between the first process and the last."""
        self._view.phase("Ray")
        cluster = open_cluster(self._config)
        self._stop.take_over()
        self._place(cluster, resume)
        try:
            serving = await self._interruptible(self._start(checkpoint))
            if serving is not None:
                await self._until_first(self._train(), serving)
        finally:
            # What fails here fails after the run's own outcome, which must not be hidden by it.
            with suppress(*JOB_ERRORS):
                await self._read_totals()
            with suppress(*JOB_ERRORS):
                await self._fleet.stop()
            with suppress(*JOB_ERRORS):
                await asyncio.wait_for(self._replay.close.remote(), STOP_GRACE_S)

    def _place(self, cluster: Cluster, resume: bool) -> None:
        """Create every actor; none of them works yet."""
        config, logs = self._config, self._run.logs.resolve()
        model_path = str(Path(config.model.path).resolve()) if Path(config.model.path).is_dir() else config.model.path
        self._replay: Any = ReplayActor.remote(
            str(self._run.replay.resolve()),
            config=config.replay,
            num_prompts=make_task(config.task, seed=config.seed).num_prompts,
            groups_per_step=config.learner.groups_per_step,
            steps=config.learner.steps,
            seed=config.seed,
            resume_step=self._next_step if resume else None,
        )
        self._learners = Learners(config, cluster, model_path=model_path, logs=logs)
        self._fleet = Fleet(
            config, cluster, model_path=model_path, replay=self._replay, board=self._learners.board, logs=logs
        )

    async def _start(self, checkpoint: Path | None) -> dict[str, asyncio.Future[None]]:
        """Learner and engines start side by side; workers serve once they hold the learner's weights."""
        config = self._config
        self._view.phase(f"{_count(config.learner.ranks, 'learner rank')}, {_count(config.rollout.workers, 'engine')}")
        engines = asyncio.ensure_future(self._fleet.start())
        await self._replay.stats.remote()  # the store's own errors come first: they are quickest to see
        await self._learners.start()
        if checkpoint is not None:
            await self._learners.load(checkpoint)
        await engines
        self._view.phase("first weights to the workers")
        await self._learners.publish()
        serving = self._fleet.serve()
        if "before" not in self._evaluations:
            self._view.phase(f"evaluation before, {self._config.task.eval_prompts} held-out prompts")
            await self._until_first(self._evaluate("before"), serving)
        return serving

    async def _train(self) -> None:
        """The learner's loop. Consumes batches; waits for the store and the ranks; produces versions and metrics."""
        config = self._config.learner
        self._view.phase("first groups")
        self._meter.start()
        while self._next_step < config.steps:
            asked_s = time.monotonic()
            batch = await self._sample(self._next_step)
            if batch is None:
                break
            wait_s = time.monotonic() - asked_s
            metrics = await self._learners.train_step(batch)
            await asyncio.gather(
                self._replay.commit.remote(step=batch.step, group_ids=batch.group_ids), self._learners.publish()
            )
            self._next_step += 1
            await self._report(metrics, wait_s)
            if config.checkpoint_every and self._next_step % config.checkpoint_every == 0:
                await self._save()
        await self._finish_training()

    async def _sample(self, step: int) -> SampledBatch | None:
        """The batch of ``step``; None if the run is asked to stop. ``JobFailed`` if no group comes for too long."""
        groups, changed_s = -1, time.monotonic()
        while not self._stop.is_set:
            batch = await self._replay.sample.remote(step=step, timeout_s=SAMPLE_S)
            if batch is not None:
                return batch
            store = await self._replay.stats.remote()
            if store["groups"] != groups:
                groups, changed_s = store["groups"], time.monotonic()
            elif time.monotonic() - changed_s > STALL_S:
                waits = "; ".join(f"{w['who']} waits for {w['what']}" for w in store["waits"])
                raise JobFailed(f"no new group for {STALL_S:g} s at step {step}: {waits}")
        return None

    async def _report(self, learner: dict[str, float], wait_s: float) -> None:
        store, workers = await asyncio.gather(self._replay.stats.remote(), self._fleet.stats())
        measured = self._meter.measure(step=self._next_step - 1, wait_s=wait_s, store=store, workers=workers)
        metrics = {**measured, **learner}
        self._tracker.step(metrics)
        self._warn_if_infeasible(metrics)
        self._view.step(metrics, self._next_step, self._config.learner.steps)

    def _warn_if_infeasible(self, metrics: dict[str, Any]) -> None:
        """Say once that λ has been at its ceiling for a while: the budget cannot be held by it."""
        self._saturated_steps = self._saturated_steps + 1 if metrics.get("dual/saturated") else 0
        if self._saturated_steps == SATURATED_STEPS:
            algorithm = self._config.algorithm
            self._view.note(
                f"λ has been at its ceiling {algorithm.lambda_max:g} for {SATURATED_STEPS} steps: the budget "
                f"δ={algorithm.delta:g} is infeasible here; lower learner.lr or raise algorithm.delta"
            )

    async def _finish_training(self) -> None:
        """Leave the weights behind, and measure them if the run came to its end."""
        if self._next_step == 0:
            return
        if not self._stop.is_set:
            self._view.phase("evaluation after")
            await self._evaluate("after")
        self._view.phase("checkpoint and model")
        await self._save()
        await self._learners.export(self._run.model.resolve())

    async def _save(self) -> None:
        await self._learners.save(self._run.checkpoints.resolve())

    async def _evaluate(self, label: str) -> None:
        evaluation = await self._fleet.evaluate(version=self._next_step)
        self._evaluations[label] = evaluation
        self._view.evaluation(label, evaluation.accuracy, evaluation.greedy_accuracy, evaluation.num_prompts)

    async def _read_totals(self) -> None:
        """The last look at store and workers, for the summary."""
        async with asyncio.timeout(STOP_GRACE_S):
            self._store = await self._replay.stats.remote()
            self._meter.add_syncs(await self._fleet.stats())

    async def _interruptible(self, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of ``work``; None, with ``work`` cancelled, if the run is asked to stop first."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return None

    async def _until_first(self, work: Coroutine[Any, Any, None], serving: dict[str, asyncio.Future[None]]) -> None:
        """Finish ``work`` while all workers serve; the error of a worker that ends before is the run's error."""
        task = asyncio.ensure_future(work)
        await asyncio.wait({task, *serving.values()}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for name, future in serving.items():
            if future.done():
                reason = future.exception() or "it ended without being asked to"
                raise JobFailed(f"{name} failed: {plain_message(reason)}; see {self._run.logs / name}.log")
        raise AssertionError("one of the futures was done")


def plain_message(failure: BaseException | str) -> str:
    """One line for a person: of an error that crossed Ray, the error itself and not the remote traceback."""
    if isinstance(failure, ray.exceptions.RayTaskError):
        failure = failure.cause
    lines = str(failure).strip().splitlines() or [type(failure).__name__]
    return lines[0]


def earlier_evaluations(run: RunDir) -> dict[str, Evaluation]:
    """The evaluation of version 0 from the summary of the run's earlier part, if it left one."""
    if not run.summary.exists():
        return {}
    before = json.loads(run.summary.read_text(encoding="utf-8"))["eval"]["before"]
    if before["accuracy"] is None:
        return {}
    return {
        "before": Evaluation(
            version=0,
            accuracy=before["accuracy"],
            greedy_accuracy=before["greedy"],
            num_prompts=before["num_prompts"],
        )
    }


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
