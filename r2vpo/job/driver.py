"""The driver: runs a job to its end, with as many sessions as that takes.

A *session* is all processes of the job on one Ray (`session.py`), which cures most deaths by itself. What it cannot
cure (the replay actor, the weight board) ends the session, and the next one begins at the newest checkpoint: what
``--resume`` does, without a person. What would fail again, or fails before everything has been up once, ends the run
with one sentence; once it has been up, a session that does not even start is one more to be cured.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from ray.exceptions import RayError

from learner.checkpoint import newest, read_state
from r2vpo.job.cluster import close_cluster, open_cluster
from r2vpo.job.component import ComponentLost, plain_message
from r2vpo.job.config import RunConfig
from r2vpo.job.reaper import Reaper
from r2vpo.job.record import RunRecord
from r2vpo.job.rundir import RunDir
from r2vpo.job.session import Session
from r2vpo.job.signals import StopRequest
from r2vpo.job.summary import FAILED, FINISHED, INTERRUPTED
from r2vpo.job.view import View, make_view

EXIT_CODES = {FINISHED: 0, FAILED: 1, INTERRUPTED: 130}
JOB_ERRORS = (ValueError, RuntimeError, TimeoutError, OSError, RayError)
"""What a run may fail with. Anything else is a programming error and keeps its traceback."""


def run_job(config: RunConfig, run: RunDir, *, resume: bool) -> int:
    """Run a job to its end and return the exit code: 0 finished, 1 failed, 130 interrupted."""
    with make_view(config, run.path) as view:
        return asyncio.run(Job(config, run, view).run(resume=resume))


class Job:
    """One run, from the first process to the last."""

    def __init__(self, config: RunConfig, run: RunDir, view: View) -> None:
        self._config, self._run, self._view = config, run, view
        self._record = RunRecord(config, run, view)
        self._stop = StopRequest()
        self._has_served = False
        """Whether every part has been up at once in any session."""

    async def run(self, *, resume: bool) -> int:
        """Start, train, leave everything in the run's folder, and end every process."""
        record = self._record
        asyncio.get_running_loop().set_exception_handler(record.errors.on_stray)
        status, error = FAILED, ""
        with self._stop:
            checkpoint = newest(self._run.checkpoints) if resume else None
            record.begin(_step(checkpoint), resume=resume)
            reaper = Reaper(self._run.logs)
            try:
                await self._sessions(checkpoint, resume=resume)
                status = INTERRUPTED if self._stop.is_set else FINISHED
            except JOB_ERRORS as failure:
                error = plain_message(failure)
                record.errors.add("the run failed", failure)
            finally:
                record.phase("ending all processes")
                close_cluster(self._run.logs, keep_logs=status == FAILED)
                reaper.close()
                record.close()
        summary = record.write_summary(status, error)
        if error:
            record.note(error)
        self._view.finish(summary)
        return EXIT_CODES[status]

    async def _sessions(self, checkpoint: Path | None, *, resume: bool) -> None:
        """One session after the other until one comes to its end. Raises what the last one failed with."""
        record = self._record
        while True:
            try:
                await self._session(checkpoint, resume=resume)
                return
            except (ComponentLost, RayError) as failure:
                if not self._has_served or self._stop.is_set:
                    raise
                loss = failure if isinstance(failure, ComponentLost) else ComponentLost(plain_message(failure))
            checkpoint, resume = newest(self._run.checkpoints), True
            step = _step(checkpoint)
            pause_s = record.restarts.begin_all(loss, remedy=f"starting all processes again, from step {step}")
            close_cluster(self._run.logs, keep_logs=False)
            record.go_back(step)
            await asyncio.sleep(pause_s)

    async def _session(self, checkpoint: Path | None, *, resume: bool) -> None:
        self._record.phase("Ray")
        cluster = open_cluster(self._config, self._run.logs)
        self._stop.take_over()
        session = Session(self._config, cluster, self._run, self._record, self._stop, resume=resume)
        try:
            await session.work(checkpoint)
        finally:
            self._has_served |= session.has_served


def _step(checkpoint: Path | None) -> int:
    return read_state(checkpoint)["version"] if checkpoint else 0
