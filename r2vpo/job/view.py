"""What a person sees while a run goes on: a live picture on a terminal, plain lines everywhere else.

    driver ── phase, evaluation, step, note, finish ──▶ LiveView  (terminal, live_view.py)
                                                    └─▶ PlainView (pipe, file, CI)

Both say the same; the metrics' keys are those of metrics.jsonl.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self, TextIO

from rich.console import Console

from r2vpo.job.config import RunConfig
from r2vpo.job.live_view import LiveView
from r2vpo.job.readings import (
    Metrics,
    Progress,
    clock_text,
    describe,
    evaluation_text,
    folder_rows,
    near_path,
    result_rows,
    resume_command,
    step_text,
    title_text,
)

PLAIN_EVERY_S = 2.0


class View(Protocol):
    """What the driver tells about a run. A context manager: leaving it gives the terminal back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def phase(self, text: str) -> None:
        """A part of the start or the end begins, such as ``engine 1 of 1: loading``; the one before it is over."""
        ...

    def evaluation(self, label: str, accuracy: float, greedy: float, num_prompts: int) -> None:
        """An evaluation is done: accuracy sampled at the training temperature, and greedy beside it."""
        ...

    def step(self, metrics: Metrics, step: int, total: int) -> None:
        """Learner step ``step`` (1-based) of ``total`` is done."""
        ...

    def note(self, text: str) -> None:
        """Something a person should know, in one sentence."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is over; ``summary`` is what summary.json holds."""
        ...


def make_view(config: RunConfig, run_path: Path, *, console: Console | None = None) -> View:
    """A live view where the output is a terminal, plain lines elsewhere."""
    where = console or Console()
    if where.is_terminal and not where.is_dumb_terminal:
        return LiveView(config, run_path, console=where)
    return PlainView(config, run_path, out=where.file)


class PlainView:
    """One line per event, and one per step but not more than one every two seconds."""

    def __init__(
        self,
        config: RunConfig,
        run_path: Path,
        *,
        out: TextIO | IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = PLAIN_EVERY_S,
    ) -> None:
        self.progress = Progress(config, clock)
        self._config = config
        self._run_path = run_path
        self._out = out or sys.stdout
        self._every_s = every_s
        self._said_s = -math.inf
        self._born_s = clock()

    def __enter__(self) -> Self:
        self._say(f"R²VPO run {self._config.name}: {describe(self._config)}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def phase(self, text: str) -> None:
        """See ``View.phase``."""
        self.progress.mark()
        self._say(f"[{clock_text(self.progress.clock() - self._born_s)}] {text}")

    def evaluation(self, label: str, accuracy: float, greedy: float, num_prompts: int) -> None:
        """See ``View.evaluation``."""
        self.progress.evaluated(label, accuracy)
        self._say(evaluation_text(label, accuracy, greedy, num_prompts))

    def step(self, metrics: Metrics, step: int, total: int) -> None:
        """See ``View.step``."""
        self.progress.add(metrics, step, total)
        now_s = self.progress.clock()
        if now_s - self._said_s >= self._every_s or step == total:
            self._said_s = now_s
            self._say(step_text(self.progress))

    def note(self, text: str) -> None:
        """See ``View.note``."""
        self._say(f"note: {text}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See ``View.finish``."""
        self._say(title_text(summary))
        for label, text in result_rows(summary, self._config):
            self._say(f"  {label:<10} {text}")
        self._say(f"in {near_path(self._run_path)}:")
        for name, text in folder_rows(self._run_path):
            self._say(f"  {name:<15} {text}")
        self._say(f"go on: {resume_command(self._run_path, summary)}")

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)
