"""Metrics on disk and in W&B.

    driver ──step──▶ metrics.jsonl ──followed by──▶ wandb_mirror (own process) ──▶ W&B, or wandb/ in the run's folder

The job itself writes one file and never touches W&B: whatever happens there (no key, no network, a crash, a hang)
costs a sentence, not the run.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from r2vpo.job.config import RunConfig
from r2vpo.job.rundir import RunDir, write_atomic
from r2vpo.job.settings import ConfigError

CLOSE_TIMEOUT_S = 10.0


class Tracker:
    """Writes metrics.jsonl, one object per step, and has W&B follow it."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        *,
        resume_step: int = 0,
        note: Callable[[str], None],
    ) -> None:
        """
        Args:
            config: the run's settings.
            run: its folder.
            resume_step: the first step that this process will write; what an earlier one wrote from there on is undone.
            note: takes a sentence for the user, such as ``View.note``; at most one per state of W&B.
        """
        self._note, self._path = note, run.metrics
        keep_until(run.metrics, resume_step)
        self._file = run.metrics.open("ab", buffering=0)
        self._waiting: list[tuple[int, bytes]] = []  # steps and their lines, for which the disk had no room
        self._mirror = None if config.tracking.wandb == "off" else Mirror(config, run)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of a step; ``metrics["step"]`` is its number. NaN and infinity become null.

        On a full disk they wait for the next step, with a note: it must not end the run.
        """
        assert "step" in metrics, "metrics of a step carry its number"
        line = json.dumps(jsonable(metrics), ensure_ascii=False, allow_nan=False) + "\n"
        self._waiting.append((metrics["step"], line.encode()))
        self._write()
        self._tell()

    def go_back(self, step: int) -> None:
        """``step`` is the next one to be written, once more; what was written from there on is undone."""
        self._file.close()
        keep_until(self._path, step)
        self._waiting = [(number, line) for number, line in self._waiting if number < step]
        self._file = self._path.open("ab", buffering=0)

    def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write no more; W&B gets ``timeout_s`` seconds to take over the rest. May be called twice."""
        if not self._file.closed:
            self._write()
        self._file.close()
        if self._mirror is not None:
            self._mirror.close(timeout_s)
            self._tell()

    def _write(self) -> None:
        """Whole lines, as many as the disk takes."""
        was_waiting = len(self._waiting) > 1
        while self._waiting:
            size = os.fstat(self._file.fileno()).st_size
            left = self._waiting[0][1]
            try:
                while left:
                    left = left[os.write(self._file.fileno(), left) :]
            except OSError as error:
                os.ftruncate(self._file.fileno(), size)
                if not was_waiting:
                    self._note(f"{self._path} cannot be written: {error.strerror}; the metrics wait for the next step")
                return
            del self._waiting[0]

    def _tell(self) -> None:
        """Pass on what W&B has to say."""
        if self._mirror is not None:
            for sentence in self._mirror.news():
                self._note(sentence)


class Mirror:
    """The process that copies metrics.jsonl to W&B. It ends when its standard input closes, so with the job."""

    def __init__(self, config: RunConfig, run: RunDir) -> None:
        self._log = run.logs / "wandb.log"
        run.logs.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "r2vpo.job.wandb_mirror", str(run.path), config.tracking.wandb],
                env={**os.environ, "WANDB_PROJECT": config.tracking.project, "WANDB_SILENT": "true"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a Ctrl-C at the terminal is the job's business: the mirror finishes its copy
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._unread = b""
        self._is_over = False
        self._was_slow = False

    def news(self) -> list[str]:
        """Sentences since the last call. Never waits."""
        if self._is_over:
            return []
        ended = self._process.poll()  # before the read: what an ended process wrote is all there
        self._unread += self._stdout.read() or b""
        *lines, self._unread = self._unread.split(b"\n")
        sentences = [line.decode(errors="replace") for line in lines]
        if ended is not None:
            self._is_over = True
            self._stdout.close()
            if self._was_slow:
                sentences.append(
                    "W&B did not take over the last metrics in time and was ended; metrics.jsonl has them all"
                )
            elif ended != 0:
                sentences.append(f"W&B is off: its process ended with code {ended}; {self._log} says why")
        return sentences

    def close(self, timeout_s: float) -> None:
        """End it: politely at first, by force after ``timeout_s`` seconds."""
        self._stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._was_slow = True
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The metrics of every step in a metrics.jsonl; a last line that was cut off by a crash is left out.

    ``ConfigError`` if any other line holds no step.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [_metrics_in(line, f"{path}, line {number}") for number, line in enumerate(lines[:-1], start=1)]


def _metrics_in(line: bytes, place: str) -> dict[str, Any]:
    try:
        metrics = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is damaged ({error}); restore the file, or remove the line") from None
    if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
        raise ConfigError(f"{place} is damaged (it has no step); restore the file, or remove the line")
    return metrics


def keep_until(path: Path, step: int) -> None:
    """Drop from a metrics.jsonl what was written for ``step`` and later ones, and half a line at its end."""
    kept = [metrics for metrics in read_metrics(path) if metrics["step"] < step]
    write_atomic(path, "".join(json.dumps(metrics, ensure_ascii=False) + "\n" for metrics in kept))


def jsonable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON has them: numbers that are none (NaN, infinity) become None."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
