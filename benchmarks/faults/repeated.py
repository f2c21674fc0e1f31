"""The whole job is killed again and again during one quickstart, each time resumed: it learns what it would have.

The driver and all below it get SIGKILL at a moment that is drawn. The final accuracy is held against undisturbed runs
that differ in the seed alone.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.faults.watch import LIMIT_S, Late
from benchmarks.table import QUICK, Row, at_least, at_most, emit, reported
from tests.faults.victims import Run

STEPS = 27 if QUICK else 100
KILLS = 2 if QUICK else 20
SEEDS = 1 if QUICK else 3
MOST_STEPS = 8
"""A kill comes after so many further learner steps at most, or before the first one."""
SETTINGS = (f"learner.steps={STEPS}", "learner.checkpoint_every=2")
SPREAD = 0.05
"""Accuracies of undisturbed runs lie this close together at least; a closer spread is not asked of the killed one."""


def measure() -> Iterator[Row]:
    undisturbed = []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
            run = Run(Path(folder), *SETTINGS, f"seed={seed}")
            code, output = run.end()
            assert code == 0, output
            undisturbed.append(accuracy(run))
            print(f"repeated: undisturbed, seed {seed}: accuracy {undisturbed[-1]:.3f}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
        yield from killed(Path(folder), undisturbed)


def killed(folder: Path, undisturbed: list[float]) -> Iterator[Row]:
    """Rows of one run that is killed ``KILLS`` times."""
    rng = random.Random(0)
    run = Run(folder, *SETTINGS)
    kills = 0
    while kills < KILLS and run.exit_code is None:
        # At times it is killed while it starts, though not the first time: there would be nothing to resume.
        goal = last_step(run) + rng.randint(0 if kills else 1, max(min(MOST_STEPS, STEPS // KILLS), 1))
        until_s = time.monotonic() + LIMIT_S
        time.sleep(rng.uniform(8.0, 20.0))
        while last_step(run) < goal and run.exit_code is None:
            if time.monotonic() > until_s:
                raise Late(f"no step {goal} within {LIMIT_S:g} s: {run.printed()[-2000:]}")
            time.sleep(0.01)
        if run.exit_code is not None:
            break
        print(f"repeated: kill {kills + 1} at step {last_step(run)}", file=sys.stderr)
        run.look()
        for process in run.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        kills += 1
        run.end()
        run = Run(folder, *SETTINGS, "--resume")
    code, output = run.end()
    if code != 0:
        print(f"repeated: {output[-3000:]}", file=sys.stderr)
    audit = run.audit()
    for violation in audit.violations:
        print(f"repeated: {violation.rule}: {violation.sentence}", file=sys.stderr)
    yield at_least("repeated: the job was killed", kills, "times", KILLS)
    yield at_most("repeated: exit code in the end", code, "", 0)
    yield at_least("repeated: steps", audit.version, "", STEPS)
    yield at_most("repeated: violations that verify --deep finds", len(audit.violations), "", 0)
    after = accuracy(run) if code == 0 else float("nan")
    bound = min(undisturbed) - max(max(undisturbed) - min(undisturbed), SPREAD)
    yield Row("repeated: accuracy", after, "sampled", f">= {bound:.3f}", after >= bound)
    yield reported("repeated: accuracy of undisturbed runs, lowest", min(undisturbed), "sampled")
    yield reported("repeated: accuracy of undisturbed runs, highest", max(undisturbed), "sampled")


def accuracy(run: Run) -> float:
    return run.summary()["eval"]["after"]["accuracy"]


def last_step(run: Run) -> int:
    """Steps that are recorded."""
    if not (run.folder / "metrics.jsonl").exists():
        return 0
    steps = run.steps()
    return steps[-1] + 1 if steps else 0


if __name__ == "__main__":
    emit(measure())
