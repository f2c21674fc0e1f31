"""The driver: introduces the rooms to each other and runs the learner's loop.

                 lease                   append                sample
    replay actor ─────▶ rollout workers ───────▶ replay shards ───────▶ driver ──batch──▶ learner ranks
        ▲                     ▲                        │                  │                    │   ▲
        │                     └────── weight board ◀───┼──── publish ─────┼────────────────────┘   │
        │                                              └──── payloads ────┼────────────────────────┘
        └──── commit ─────────────────────────────────────────────────────┘

The driver waits for two things only: the next batch (the store says what that waits for) and the learner's step. The
workers serve on their own. Meanwhile it looks at every process: a replay shard that dies is started again (`store.py`);
any other that fails or dies ends the run with one sentence that names it, since nobody is left who would replace it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from ray.exceptions import RayError

from learner.checkpoint import complete, newest, read_state
from r2vpo.job.cluster import Cluster, close_cluster, open_cluster
from r2vpo.job.component import (
    JobFailed,
    cancelled,
    plain_message,
    roll_call,
    together,
    until_stop,
    while_all_live,
)
from r2vpo.job.config import RunConfig
from r2vpo.job.errorlog import ErrorLog
from r2vpo.job.fleet import Fleet
from r2vpo.job.learners import Learners
from r2vpo.job.links import ReplayLink, ShardedBatch
from r2vpo.job.measure import Alarms, StepMeter, stall_text
from r2vpo.job.reaper import Reaper
from r2vpo.job.rundir import RunDir
from r2vpo.job.signals import StopRequest
from r2vpo.job.store import GOODBYE_S
from r2vpo.job.summary import FAILED, FINISHED, INTERRUPTED, RUNNING, earlier_evaluations, summarise
from r2vpo.job.tracking import Tracker, read_metrics
from r2vpo.job.view import View, make_view
from r2vpo.job.yard import make_store
from r2vpo.records import Evaluation

SAMPLE_S = 1.0
"""Longest single wait for a batch (seconds); the driver looks around and asks again."""
LOOK_S = 1.0
"""Between two looks at the store (seconds)."""
STALL_S = 600.0
"""Seconds without a single new group to train on after which the run ends, saying who waits for what."""
TROUBLE_S = 12 * 3600.0
"""The same while the store has said what it lacks, such as room on its disk: until somebody has seen to it."""

EXIT_CODES = {FINISHED: 0, FAILED: 1, INTERRUPTED: 130}
EMPTY_STORE = {"version": 0, "groups": 0, "trajectories": 0, "sampled_tokens": 0, "outcomes": {}}
JOB_ERRORS = (ValueError, RuntimeError, TimeoutError, OSError, RayError)
"""What a run may fail with. Anything else is a programming error and keeps its traceback."""


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
        self._born_s = time.monotonic()
        self._meter = StepMeter()
        self._alarms = Alarms(config.algorithm)
        self._errors = ErrorLog(run.logs / "error.log")
        self._evaluations: dict[str, Evaluation] = {}
        self._next_step = self._saved_step = 0
        self._totals: dict[str, Any] = dict(EMPTY_STORE)
        self._stop = StopRequest()

    async def run(self, *, resume: bool) -> int:
        """Start, train, leave everything in the run's folder, and end every process."""
        asyncio.get_running_loop().set_exception_handler(self._errors.on_stray)
        status, error = FAILED, ""
        with self._stop:
            checkpoint = newest(self._run.checkpoints) if resume else None
            self._next_step = self._saved_step = read_state(checkpoint)["version"] if checkpoint else 0
            if resume:
                self._evaluations = earlier_evaluations(self._run.summary)
            self._tracker = Tracker(self._config, self._run, resume_step=self._next_step, note=self._view.note)
            reaper = Reaper(self._run.logs)
            try:
                await self._live(checkpoint, resume)
                status = INTERRUPTED if self._stop.is_set else FINISHED
            except JOB_ERRORS as failure:
                error = plain_message(failure)
                self._errors.add("the run failed", failure)
            finally:
                self._view.phase("ending all processes")
                close_cluster(self._run.logs, keep_logs=status == FAILED)
                reaper.close()
                self._tracker.close()
        summary = self._write_summary(status, error)
        if error:
            self._view.note(error)
        self._view.finish(summary)
        return EXIT_CODES[status]

    async def _live(self, checkpoint: Path | None, resume: bool) -> None:
        """Everything between the first process and the last."""
        self._view.phase("Ray")
        cluster = open_cluster(self._config, self._run.logs)
        self._stop.take_over()
        self._place(cluster, resume)
        try:
            await self._work(checkpoint)
        except JOB_ERRORS as failure:
            # Whoever lost a partner may have spoken before the news of its death came.
            deaths = await roll_call(self._components)
            if not deaths:
                raise
            raise JobFailed("; ".join(map(str, deaths))) from failure
        finally:
            # What fails here fails after the run's own outcome, which must not be hidden by it.
            with suppress(*JOB_ERRORS):
                await self._read_totals()
            await self._fleet.stop()
            await self._store.close()

    def _place(self, cluster: Cluster, resume: bool) -> None:
        """Create every actor; none of them works yet."""
        config, logs = self._config, self._run.logs.resolve()
        model_path = str(Path(config.model.path).resolve()) if Path(config.model.path).is_dir() else config.model.path
        self._store = make_store(
            config,
            self._run.replay.resolve(),
            resume_step=self._next_step if resume else None,
            note=self._view.note,
            errors=self._errors,
        )
        self._learners = Learners(config, cluster, model_path=model_path, logs=logs)
        board = self._learners.board
        replay = ReplayLink(self._store.replay, config.replay.shards)
        self._fleet = Fleet(config, cluster, model_path=model_path, replay=replay, board=board, logs=logs)
        # Without the shards, whose deaths are not the end.
        self._components = [self._store.replay, board, *self._learners.ranks, *self._fleet.workers]

    async def _work(self, checkpoint: Path | None) -> None:
        """From the first process that is up to the trained model."""
        lives = [asyncio.create_task(component.watch()) for component in self._components]
        try:
            # The store comes first: its errors are quickest to see.
            self._view.phase(f"replay store, {_count(self._config.replay.shards, 'shard')}")
            await while_all_live(until_stop(self._store.start(), self._stop.wait), lives)
            if self._stop.is_set:
                return
            lives.append(asyncio.create_task(self._store.watch()))
            await while_all_live(until_stop(self._start(checkpoint), self._stop.wait), lives)
            if self._stop.is_set:
                return
            lives += [*self._fleet.serve(), asyncio.create_task(self._look_at_store())]
            if self._next_step == 0 and "before" not in self._evaluations:
                await while_all_live(until_stop(self._evaluate("before"), self._stop.wait), lives)
            self._write_summary(RUNNING)
            await while_all_live(self._train(), lives)
            if self._next_step > 0:
                await while_all_live(self._leave_weights(), lives)
            if not self._stop.is_set:
                await while_all_live(until_stop(self._evaluate("after"), self._stop.wait), lives)
        finally:
            await cancelled(*lives)

    async def _start(self, checkpoint: Path | None) -> None:
        """Learner and engines start side by side; then the learner's weights are there for the workers to take."""
        config = self._config
        self._view.phase(f"{_count(config.learner.ranks, 'learner rank')}, {_count(config.rollout.workers, 'engine')}")
        self._totals = await self._store.stats()
        await self._keep_what_resuming_needs()
        await together(self._start_learners(checkpoint), self._fleet.start())
        self._view.phase("first weights to the workers")
        await self._learners.publish()

    async def _start_learners(self, checkpoint: Path | None) -> None:
        await self._learners.start()
        if checkpoint is not None:
            await self._learners.load(checkpoint)

    async def _train(self) -> None:
        """The learner's loop. Consumes batches; waits for the store and the ranks; produces versions and metrics."""
        config = self._config.learner
        self._view.phase("first groups")
        self._meter.start(await self._fleet.stats())
        while self._next_step < config.steps:
            asked_s = time.monotonic()
            batch = await self._sample(self._next_step)
            if batch is None:
                break
            wait_s = time.monotonic() - asked_s
            metrics = await self._learners.train_step(batch)
            await together(self._store.commit(batch, stop=self._stop.wait), self._learners.publish())
            self._next_step += 1
            await self._report(metrics, wait_s)
            if config.checkpoint_every and self._next_step % config.checkpoint_every == 0:
                await self._save()

    async def _sample(self, step: int) -> ShardedBatch | None:
        """The batch of ``step``; None if the run is asked to stop. ``JobFailed`` if nothing to train on comes."""
        usable, changed_s = -1, time.monotonic()
        while not self._stop.is_set:
            batch = await self._store.sample(step=step, timeout_s=SAMPLE_S)
            if batch is not None:
                return batch
            store = self._totals
            now_usable = store["groups"] - sum(store["unusable"].values())
            limit_s = TROUBLE_S if store["troubles"] else STALL_S
            if now_usable != usable:
                usable, changed_s = now_usable, time.monotonic()
            elif time.monotonic() - changed_s > limit_s:
                raise JobFailed(stall_text(store, step=step, limit_s=limit_s))
        return None

    async def _look_at_store(self) -> NoReturn:
        """Tell what ails the store when it begins and when it is over, whoever is waiting for it meanwhile."""
        while True:
            self._totals = await self._store.stats()
            self._note(self._alarms.look_at(self._totals))
            await asyncio.sleep(LOOK_S)

    async def _report(self, learner: dict[str, float], wait_s: float) -> None:
        self._totals = await self._store.stats()
        workers = await self._fleet.stats()
        measured = self._meter.measure(step=self._next_step - 1, wait_s=wait_s, store=self._totals, workers=workers)
        metrics = {**measured, **learner}
        self._tracker.step(metrics)
        self._view.step(metrics, self._next_step, self._config.learner.steps)
        self._note([*self._alarms.look(metrics), *self._alarms.look_at(self._totals)])

    def _note(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            self._view.note(sentence)

    async def _leave_weights(self) -> None:
        self._view.phase("checkpoint and model")
        await self._save()
        await self._learners.export(self._run.model.resolve())

    async def _save(self) -> None:
        if self._saved_step != self._next_step:
            await self._learners.save(self._run.checkpoints.resolve())
            self._saved_step = self._next_step
            await self._keep_what_resuming_needs()

    async def _keep_what_resuming_needs(self) -> None:
        """The run may be resumed at any checkpoint that is kept, or at its beginning if there is none."""
        await self._store.keep_from(min(complete(self._run.checkpoints), default=0))

    async def _evaluate(self, label: str) -> None:
        self._view.phase(f"evaluation {label}, {self._config.task.eval_prompts} held-out prompts")
        evaluation = await self._fleet.evaluate(version=self._next_step)
        self._evaluations[label] = evaluation
        self._view.evaluation(label, evaluation.accuracy, evaluation.greedy_accuracy, evaluation.num_prompts)

    async def _read_totals(self) -> None:
        """The last look at store and workers, for the summary."""
        async with asyncio.timeout(GOODBYE_S):
            self._totals = await self._store.stats()
            self._meter.add_syncs(await self._fleet.stats())

    def _write_summary(self, status: str, error: str = "") -> dict[str, Any]:
        summary = summarise(
            self._config,
            steps=read_metrics(self._run.metrics),
            status=status,
            wall_s=time.monotonic() - self._born_s,
            evaluations=self._evaluations,
            store=self._totals,
            syncs=self._meter.syncs,
        )
        self._run.write_summary(summary | ({"error": error} if error else {}))
        return summary


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
