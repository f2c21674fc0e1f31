"""What a run has come to so far, whichever processes were at work: its position, its metrics, its summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from r2vpo.job.checkpoints import Checkpoints
from r2vpo.job.config import RunConfig
from r2vpo.job.errorlog import ErrorLog
from r2vpo.job.measure import Alarms, StepMeter
from r2vpo.job.readings import evaluation_text
from r2vpo.job.restarts import Restarts
from r2vpo.job.rundir import RunDir
from r2vpo.job.summary import earlier_evaluations, summarise
from r2vpo.job.tracking import Tracker, read_metrics
from r2vpo.job.view import View
from r2vpo.records import Evaluation, RolloutStats

FIRST_GROUPS = "first groups"
"""The phase that the first learner step ends."""
EMPTY_STORE = {"version": 0, "groups": 0, "trajectories": 0, "sampled_tokens": 0, "outcomes": {}}


class RunRecord:
    """Kept by the driver from the first to the last process of a run; everything here outlives a learner group."""

    def __init__(self, config: RunConfig, run: RunDir, view: View) -> None:
        self._config, self._run, self.view = config, run, view
        self._born_s = time.monotonic()
        self.errors = ErrorLog(run.logs / "error.log")
        self.restarts = Restarts(config.supervisor, note=view.note, errors=self.errors)
        self.meter = StepMeter()
        self.alarms = Alarms(config)
        self.evaluations: dict[str, Evaluation] = {}
        self.next_step = 0
        """The next learner step, and the version of the weights."""
        self.checkpoints = Checkpoints(config.learner, run.checkpoints.resolve(), note=view.note)
        self.store: dict[str, Any] = dict(EMPTY_STORE)
        """What the store said last."""
        self.metrics: Mapping[str, Any] = {}
        """Those of the newest step."""
        self.phase_text, self.phase_since_s = "", time.time()
        self._tracker: Tracker | None = None

    def begin(self, step: int, *, resume: bool) -> None:
        """The run starts, or goes on, at ``step``."""
        self.next_step = self.checkpoints.saved_step = step
        if resume:
            self.evaluations = earlier_evaluations(self._run.summary)
        self._tracker = Tracker(self._config, self._run, resume_step=step, note=self.view.note)

    def go_back(self, step: int) -> None:
        """The learner goes on at ``step`` once more; what was recorded from there on is undone."""
        self.next_step = self.checkpoints.saved_step = step
        self._open_tracker.go_back(step)

    def phase(self, text: str) -> None:
        """A part of the start or the end begins."""
        self.phase_text, self.phase_since_s = text, time.time()
        self.view.phase(text)

    def note(self, *sentences: str) -> None:
        """Tell a person."""
        for sentence in sentences:
            self.view.note(sentence)

    def look_at_store(self, store: dict[str, Any]) -> None:
        """Take in what the store says, and tell what is alarming."""
        self.store = store
        self.note(*self.alarms.look_at(store))

    def step(self, learner: Mapping[str, float], *, wait_s: float, workers: Sequence[RolloutStats]) -> None:
        """A learner step is done: record its metrics. ``RuntimeError`` if the run must not go on like this."""
        measured = self.meter.measure(step=self.next_step, wait_s=wait_s, store=self.store, workers=workers)
        self.metrics = {**measured, "time/save_s": self.checkpoints.take_spent_s(), **learner}
        self.next_step += 1
        if self.phase_text == FIRST_GROUPS:  # only status tells: the steps themselves say that training goes on
            self.phase_text, self.phase_since_s = "training", time.time()
        self._open_tracker.step(self.metrics)
        self.view.step(self.metrics, self.next_step, self._config.learner.steps)
        self.note(*self.alarms.look(self.metrics))

    def evaluation(self, label: str, result: Evaluation) -> None:
        """An evaluation is done."""
        self.evaluations[label] = result
        self.view.evaluation(label, result.accuracy, result.greedy_accuracy, result.num_prompts)
        for name, score in result.sets.items():
            self.note(evaluation_text(f"{label} on {name}", score.accuracy, score.greedy_accuracy, score.num_prompts))

    def write_summary(self, status: str, error: str = "") -> dict[str, Any]:
        """Write summary.json; returns its content."""
        summary = summarise(
            self._config,
            steps=read_metrics(self._run.metrics),
            status=status,
            wall_s=time.monotonic() - self._born_s,
            evaluations=self.evaluations,
            store=self.store,
            syncs=self.meter.syncs,
            restarts=self.restarts.totals,
        )
        self._run.write_summary(summary | ({"error": error} if error else {}))
        return summary

    def close(self) -> None:
        """Metrics are complete."""
        if self._tracker is not None:
            self._tracker.close()

    @property
    def _open_tracker(self) -> Tracker:
        assert self._tracker is not None, "begin comes first"
        return self._tracker
