"""The job's processes, from the first to the last: introduces the rooms to each other and runs the learner's loop.

                 lease                   append                sample
    replay actor ─────▶ rollout workers ───────▶ replay shards ───────▶ driver ──batch──▶ learner ranks
        ▲                     ▲                        │                  │                    │   ▲
        │                     └────── weight board ◀───┼──── publish ─────┼────────────────────┘   │
        │                                              └──── payloads ────┼────────────────────────┘
        └──── commit ─────────────────────────────────────────────────────┘

The driver waits for two things only: the next batch (the store says what that waits for) and the learner's step. The
workers serve on their own. Meanwhile it looks at every process:

| who dies or hangs | what is done |
|---|---|
| a rollout worker | another takes its place (`fleet.py`); the learner goes on with what the others bring |
| a replay shard | it is started again on its file (`store.py`); its groups wait |
| a learner rank | another group goes on from the newest checkpoint, the store goes back to its step (here) |
| replay actor, weight board | the session ends, another one begins at the newest checkpoint (`driver.py`) |
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from learner.checkpoint import newest, read_state
from r2vpo.job import status
from r2vpo.job.autoscale import Autoscaler
from r2vpo.job.cluster import Cluster
from r2vpo.job.component import (
    ComponentDied,
    FailedForGood,
    JobFailed,
    cancelled,
    roll_call,
    together,
    until_stop,
    while_all_live,
)
from r2vpo.job.config import RunConfig
from r2vpo.job.crew import RayLauncher
from r2vpo.job.fleet import Fleet
from r2vpo.job.learners import Learners, LearnersLost, make_board
from r2vpo.job.links import ReplayLink, ShardedBatch
from r2vpo.job.mailbox import serve_mailbox
from r2vpo.job.measure import stall_text
from r2vpo.job.record import FIRST_GROUPS, RunRecord
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError
from r2vpo.job.signals import StopRequest
from r2vpo.job.status import ComponentStatus, RunStatus, StoreStatus
from r2vpo.job.store import GOODBYE_S
from r2vpo.job.summary import RUNNING, evaluation_metrics
from r2vpo.job.yard import make_store

SAMPLE_S = 1.0
"""Longest single wait for a batch (seconds); the driver looks around and asks again."""
LOOK_S = 1.0
"""Between two looks at the store (seconds)."""
STALL_S = 600.0
"""Seconds without a single new group to train on after which the run ends, saying who waits for what."""
TROUBLE_S = 12 * 3600.0
"""The same while the store has said what it lacks, such as room on its disk: until somebody has seen to it."""
LEARNERS = "learner group"


class Session:
    """All processes of a job on one Ray. Construct it once Ray is there; ``work`` once."""

    def __init__(
        self, config: RunConfig, cluster: Cluster, run: RunDir, record: RunRecord, stop: StopRequest, *, resume: bool
    ) -> None:
        """Create every actor; none of them works yet. ``record.next_step`` is where the run begins, or goes on."""
        self._config, self._cluster, self._run, self._record, self._stop = config, cluster, run, record, stop
        path = Path(config.model.path)
        self._model_path = str(path.resolve()) if path.is_dir() else config.model.path
        self._store = make_store(
            config,
            run.place_replay(config.replay.directory),
            resume_step=record.next_step if resume else None,
            note=record.note,
            restarts=record.restarts,
        )
        self._board = make_board()
        self._lineage = 0
        self._learners = self._make_learners()
        replay = ReplayLink(self._store.replay, config.replay.shards)
        launcher = RayLauncher(
            config, cluster, model_path=self._model_path, replay=replay, board=self._board, logs=run.logs.resolve()
        )
        pools = config.rollout.by_pool
        self._fleet = Fleet(
            launcher,
            workers={name: pool.workers for name, pool in pools.items()},
            replay=self._store.replay,
            restarts=record.restarts,
            note=record.note,
            eval_prompts=config.task.eval_prompts,
            start_timeout_s=config.rollout.start_timeout_s,
            silent_s=config.supervisor.silent_s,
            fixed=config.fixed_fleet,
            spot=[name for name, pool in pools.items() if pool.spot],
        )
        self._autoscaler = Autoscaler(config.rollout.autoscale)
        self.has_served = False
        """Whether every part has been up: what fails later may be cured by starting it again."""
        self._wants_checkpoint = asyncio.Event()
        self._has_checkpoint = asyncio.Event()
        self._learner_error = ""

    async def work(self, checkpoint: Path | None) -> None:
        """From the first process that is up to the trained model, or until the run is asked to stop."""
        try:
            await self._work(checkpoint)
        except JobFailed as failure:
            # Whoever lost a partner may have spoken before the news of its death came.
            deaths = await roll_call([self._store.replay, self._board])
            if not deaths:
                raise
            raise ComponentDied("; ".join(map(str, deaths))) from failure
        finally:
            # What fails here fails after the run's own outcome, which must not be hidden by it.
            with suppress(JobFailed, TimeoutError):
                await self._read_totals()
            await self._fleet.stop()
            await self._store.close()

    # The start

    async def _work(self, checkpoint: Path | None) -> None:
        silent_s = self._config.supervisor.silent_s
        lives: list[asyncio.Task[NoReturn]] = [
            asyncio.create_task(component.watch(silent_s=silent_s)) for component in (self._store.replay, self._board)
        ]
        lives.append(asyncio.create_task(self._tell()))
        lives.append(asyncio.create_task(serve_mailbox(self._run.control, self._obey)))
        try:
            # The store comes first: its errors are quickest to see.
            self._record.phase(f"replay store, {_count(self._config.replay.shards, 'shard')}")
            await while_all_live(until_stop(self._store.start(), self._stop.wait), lives)
            if self._stop.is_set:
                return
            lives.append(asyncio.create_task(self._store.watch()))
            await while_all_live(until_stop(self._start(checkpoint), self._stop.wait), lives)
            if self._stop.is_set:
                return
            lives += [asyncio.create_task(life) for life in (self._fleet.keep(), self._look_at_store())]
            self._record.phase("first weights to the workers")
            await while_all_live(until_stop(self._learners.publish(), self._stop.wait), lives)
            if self._stop.is_set:
                return
            self.has_served = True
            await while_all_live(self._train_to_the_end(), lives)
        finally:
            await cancelled(*lives)

    async def _start(self, checkpoint: Path | None) -> None:
        """Learner and engines start side by side; then the learner's weights are there for the workers to take."""
        config = self._config
        self._record.phase(
            f"{_count(config.learner.ranks, 'learner rank')}, {_count(config.rollout.workers, 'engine')}"
        )
        self._record.store = await self._store.stats()
        await self._keep_what_resuming_needs()
        await together(self._start_learners(checkpoint), self._fleet.start())
        if config.fixed_fleet:
            self._record.phase("learner and workers meet for broadcasts")
            await self._learners.meet(self._fleet.components, gpus_each=config.rollout.engine_gpus)

    def _make_learners(self) -> Learners:
        return Learners(
            self._config,
            self._cluster,
            board=self._board,
            model_path=self._model_path,
            logs=self._run.logs.resolve(),
            lineage=self._lineage,
        )

    async def _start_learners(self, checkpoint: Path | None) -> None:
        await self._learners.start()
        if checkpoint is not None:
            await self._learners.load(checkpoint)

    # The learner's loop

    async def _train_to_the_end(self) -> None:
        """Train, save and evaluate, with as many learner groups as that takes."""
        is_over = False
        while not is_over:
            watch = asyncio.create_task(self._learners.watch())
            try:
                await while_all_live(self._train_and_leave(), [watch])
                is_over = True
            except LearnersLost as lost:
                await cancelled(watch)
                if self._stop.is_set:
                    raise
                await until_stop(self._replace_learners(lost), self._stop.wait)
                is_over = self._stop.is_set
            finally:
                await cancelled(watch)

    async def _train_and_leave(self) -> None:
        record = self._record
        if record.next_step == 0 and "before" not in record.evaluations:
            await until_stop(self._evaluate("before"), self._stop.wait)
        record.write_summary(RUNNING)
        await self._train()
        if record.next_step > 0:
            record.phase("checkpoint and model")
            await self._save()
            await self._learners.export(self._run.model.resolve())
        if not self._stop.is_set:
            await until_stop(self._evaluate("after"), self._stop.wait)

    async def _train(self) -> None:
        """The learner's loop. Consumes batches; waits for the store and the ranks; produces versions and metrics.

        At lag 0 weights go out last, after their checkpoint: what is sampled from weights that are lost is lost with
        them, and a run that goes on from its checkpoint would train on other prompts. An evaluation needs them sooner.
        """
        config, record = self._config.learner, self._record
        publishes_last = self._config.replay.max_lag == 0 and not self._config.task.eval_every
        record.phase(FIRST_GROUPS)
        record.meter.start(await self._fleet.stats())
        while record.next_step < config.steps:
            asked_s = time.monotonic()
            batch = await self._sample(record.next_step)
            if batch is None:
                break
            wait_s = time.monotonic() - asked_s
            metrics = await self._learners.train_step(batch)
            commit = self._store.commit(batch, stop=self._stop.wait)
            if publishes_last:
                await commit
            else:
                await together(commit, self._learners.publish_due(record.next_step + 1))
            record.look_at_store(await self._store.stats())
            metrics |= await self._progress(record.next_step + 1)
            record.step(metrics, wait_s=wait_s, workers=await self._fleet.stats())
            self._autoscale()
            is_due = record.alarms.is_sound and record.checkpoints.is_due(record.next_step)
            if is_due or self._wants_checkpoint.is_set():
                await self._save()
            if publishes_last:
                await self._learners.publish_due(record.next_step)

    async def _sample(self, step: int) -> ShardedBatch | None:
        """The batch of ``step``; None if the run is asked to stop. ``FailedForGood`` if nothing to train on comes."""
        usable, changed_s = -1, time.monotonic()
        while not self._stop.is_set:
            batch = await self._store.sample(step=step, timeout_s=SAMPLE_S)
            if batch is not None:
                return batch
            if self._wants_checkpoint.is_set():
                await self._save()
            store = self._record.store
            now_usable = store["groups"] - sum(store["unusable"].values())
            limit_s = TROUBLE_S if store["troubles"] else STALL_S
            if now_usable != usable:
                usable, changed_s = now_usable, time.monotonic()
            elif time.monotonic() - changed_s > limit_s:
                raise FailedForGood(stall_text(store, step=step, limit_s=limit_s))
        return None

    async def _save(self) -> None:
        if await self._record.checkpoints.write(self._record.next_step, self._learners.save):
            await self._keep_what_resuming_needs()
        self._wants_checkpoint.clear()
        self._has_checkpoint.set()

    async def _keep_what_resuming_needs(self) -> None:
        """The run may be resumed at one of its newest checkpoints, or at its beginning if there is none."""
        await self._store.keep_from(self._record.checkpoints.oldest_resumable)

    async def _evaluate(self, label: str) -> None:
        record = self._record
        record.phase(f"evaluation {label}, {self._config.task.eval_prompts} held-out prompts")
        record.evaluation(label, await self._fleet.evaluate(version=record.next_step))

    async def _progress(self, version: int) -> dict[str, float]:
        """Accuracy on held-out prompts of every ``task.eval_every``-th version but the last; nothing of others."""
        every = self._config.task.eval_every
        if not every or version % every or version == self._config.learner.steps:
            return {}
        return evaluation_metrics(await self._fleet.evaluate(version=version))

    async def _replace_learners(self, lost: JobFailed) -> None:
        """Another learner group goes on from the newest checkpoint; the store goes back with it.

        Workers generate on until its first weights arrive, and then drop what is in flight: it was sampled from weights
        that the learner will not have had. What the store holds of versions up to the checkpoint's is trained on.
        """
        record = self._record
        if self._config.fixed_fleet:
            raise FailedForGood(f"{lost}; {self._config.fixed_fleet}")
        while True:
            checkpoint = newest(self._run.checkpoints)
            step = read_state(checkpoint)["version"] if checkpoint else 0
            pause_s = record.restarts.begin(
                LEARNERS, lost, role="learner", remedy=f"another learner group goes on from step {step}"
            )
            self._learner_error = str(lost)
            began_s = time.monotonic()
            await self._board.ask("withdraw")
            await self._learners.end()
            await self._store.rewind(step)
            record.go_back(step)
            await asyncio.sleep(pause_s)
            self._lineage += 1
            self._learners = self._make_learners()
            try:
                await self._start_learners(checkpoint)
                await self._learners.publish()
            except LearnersLost as again:
                lost = again
            else:
                record.note(f"the {LEARNERS} is back at step {step} after {time.monotonic() - began_s:.0f} s")
                return

    def _autoscale(self) -> None:
        """Add or drain a worker if the last steps say so."""
        fleet = self._fleet
        change = self._autoscaler.look(self._record.metrics, target=fleet.target, serving=fleet.num_serving)
        if change is not None:
            fleet.scale(change.workers)
            self._record.note(change.reason)

    # What people ask for, and are told

    async def _obey(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out a command of the mailbox. ``ConfigError`` if it cannot be."""
        match command:
            case "scale":
                before = self._fleet.target
                pool = arguments.get("pool")
                self._fleet.scale(arguments["rollout"], pool=pool)
                where = f", {arguments['rollout']} of them in pool {pool}" if pool else ""
                self._record.note(f"scaling from {before} to {self._fleet.target} rollout workers{where}, as asked")
                return {"before": before, "after": self._fleet.target}
            case "drain":
                sentence = self._fleet.drain(arguments["worker"])
                self._record.note(f"{sentence}, as asked")
                return {"text": sentence}
            case "checkpoint":
                self._has_checkpoint.clear()
                self._wants_checkpoint.set()
                await self._has_checkpoint.wait()
                if failure := self._record.checkpoints.failure:
                    raise ConfigError(failure)
                return {"step": self._record.checkpoints.saved_step}
            case _:
                assert command == "stop", command
                self._stop.set()
                return {"step": self._record.next_step}

    async def _tell(self) -> NoReturn:
        """Keep RUN/status.json new. Waits for nobody: what it says is what was last heard."""
        while True:
            status.write(self._run.status, self._status())
            await asyncio.sleep(LOOK_S)

    async def _look_at_store(self) -> NoReturn:
        """Tell what ails the store when it begins and when it is over, whoever is waiting for it meanwhile."""
        while True:
            self._record.look_at_store(await self._store.stats())
            await asyncio.sleep(LOOK_S)

    def _status(self) -> RunStatus:
        record = self._record
        return RunStatus(
            run=self._config.name,
            updated_s=time.time(),
            pid=os.getpid(),
            host=socket.gethostname(),
            phase=record.phase_text,
            phase_since_s=record.phase_since_s,
            step=record.next_step,
            steps=self._config.learner.steps,
            version=record.next_step,
            target_workers=self._fleet.target,
            components=tuple(self._components()),
            store=StoreStatus.from_stats(record.store) if "waits" in record.store else None,
            rates=record.metrics,
            last_error=record.errors.last,
        )

    def _components(self) -> list[ComponentStatus]:
        record = self._record
        return [
            *self._learners.status(restarts=record.restarts.count(LEARNERS), last_error=self._learner_error),
            self._beside_the_driver("weight board", "board", f"announces version {record.next_step}"),
            self._beside_the_driver("replay store", "replay", _store_text(record.store)),
            *self._store.status(record.store),
            *self._fleet.status(),
        ]

    def _beside_the_driver(self, name: str, role: str, doing: str) -> ComponentStatus:
        return ComponentStatus(
            name=name,
            role=role,
            state="serving" if self.has_served else "starting",
            doing=doing if self.has_served else "",
            since_s=self._record.phase_since_s,
            node=socket.gethostname(),
        )

    async def _read_totals(self) -> None:
        """The last look at store and workers, for the summary."""
        async with asyncio.timeout(GOODBYE_S):
            self._record.store = await self._store.stats()
            self._record.meter.add_syncs(await self._fleet.stats())


def _store_text(stats: Mapping[str, Any]) -> str:
    """What the replay store has to hand out."""
    if "fresh_waiting" not in stats:
        return ""
    return f"{stats['fresh_waiting']} fresh groups wait, {stats['in_flight']} prompts are leased"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
