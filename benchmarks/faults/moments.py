"""The phases of a run that a fault is to hit, and how each is seen from outside."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.faults.watch import status
from tests.faults.victims import Run

GENERATION, APPEND, SAMPLING = "generation", "append", "sampling"
BACKWARD, CHECKPOINT, LOAD = "backward", "checkpoint write", "weight load"
WAIT_S = 60.0
"""Longest wait for a phase; a fault comes then anyway, and counts as one at no phase (seconds)."""
LOOK_S = 0.002


def await_phase(run: Run, phase: str, rng: random.Random) -> bool:
    """Return within the phase, at a moment of it that is drawn; False if it was not seen in time."""
    run.look()
    is_there = _PHASES[phase](run)
    until_s = time.monotonic() + WAIT_S
    while not is_there():
        if time.monotonic() > until_s or run.exit_code is not None:
            return False
        time.sleep(LOOK_S)
    time.sleep(rng.uniform(0.0, _SPANS_S[phase]))
    return True


_SPANS_S = {GENERATION: 0.5, APPEND: 0.01, SAMPLING: 0.05, BACKWARD: 0.2, CHECKPOINT: 0.01, LOAD: 0.01}
"""How long after its beginning is seen the fault comes at most (seconds): a part of how long the phase lasts."""


def _generation(run: Run) -> Callable[[], bool]:
    return lambda: any(worker["in_flight"] for worker in status(run, role="rollout"))


def _append(run: Run) -> Callable[[], bool]:
    """Workers write a line when a group is acknowledged; others are under way then."""
    return _growth(lambda: sum(log.stat().st_size for log in (run.folder / "logs").glob("rollout-*.log")))


def _sampling(run: Run) -> Callable[[], bool]:
    """The metrics of a step are written last; then the next batch is drawn."""
    metrics = run.folder / "metrics.jsonl"
    return _growth(lambda: metrics.stat().st_size if metrics.exists() else 0)


def _backward(run: Run) -> Callable[[], bool]:
    """Ray puts the method that runs into the process's title."""
    ranks = run.titled("ray::LearnerRank")
    return lambda: any("train_step" in _title(rank) for rank in ranks)


def _checkpoint(run: Run) -> Callable[[], bool]:
    return lambda: any((run.folder / "checkpoints").glob("step-*.tmp"))


def _load(run: Run) -> Callable[[], bool]:
    """Weights lie in files without a name as long as they are being loaded."""
    workers = run.titled("ray::RolloutActor")
    return lambda: any(_holds_weights(worker.pid) for worker in workers)


_PHASES: dict[str, Callable[[Run], Callable[[], bool]]] = {
    GENERATION: _generation,
    APPEND: _append,
    SAMPLING: _sampling,
    BACKWARD: _backward,
    CHECKPOINT: _checkpoint,
    LOAD: _load,
}


def _growth(size: Callable[[], int]) -> Callable[[], bool]:
    before = size()
    return lambda: size() > before


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def _holds_weights(pid: int) -> bool:
    with suppress(OSError):  # the process has ended, or let go of the file
        return any("r2vpo-weights" in os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir())
    return False
