"""What checkpoints cost: the quickstart with one every few steps, so that there are enough of them to measure.

A line of metrics.jsonl says how long its step took, from the line before to this one, and how much of that went into a
checkpoint. The share at the default interval of E steps is that of one checkpoint in E steps without any. Generation is
not held back by a checkpoint if the workers are no more idle in steps with one than in the others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.table import QUICK, REPOSITORY, Row, at_most, emit, reported
from learner.config import LearnerConfig

RECIPE = REPOSITORY / "configs" / "quickstart.yaml"
DEFAULT_EVERY = LearnerConfig().checkpoint_every
EVERY = 3
"""Learner steps between checkpoints while it is measured."""
TARGET_SHARE = 0.05
TARGET_IDLE = 0.1
"""How much more of the time the workers may be idle in steps with a checkpoint."""


def measure(steps: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
        lines = quickstart(Path(folder), f"learner.steps={steps}", f"learner.checkpoint_every={EVERY}")
    yield from figures(lines)


def quickstart(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one run."""
    command = [sys.executable, "-m", "r2vpo", "train", str(RECIPE), f"run_dir={folder}", "name=run"]
    settings = ["tracking.wandb=off", "task.eval_prompts=16", *overrides]
    subprocess.run([*command, *settings], cwd=REPOSITORY, stdout=sys.stderr, check=True)
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def figures(lines: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Rows of a run's lines; the first, in which the pipeline fills, is left out."""
    with_one = [line for line in lines[1:] if line["time/save_s"] > 0]
    without = [line for line in lines[1:] if line["time/save_s"] == 0]
    save_s = median(line["time/save_s"] for line in with_one)
    step_s = median(line["time/step_s"] for line in without)
    share = save_s / (save_s + DEFAULT_EVERY * step_s)
    yield at_most(f"checkpoint: share of the wall time, one every {DEFAULT_EVERY} steps", share, "", TARGET_SHARE)
    more_idle = mean(map(_idle, with_one)) - mean(map(_idle, without))
    yield at_most("checkpoint: how much more idle the workers are meanwhile", more_idle, "of the time", TARGET_IDLE)
    yield reported("checkpoint: one takes", save_s, "s, median")
    yield reported("checkpoint: a learner step without one takes", step_s, "s, median")


def _idle(line: Mapping[str, Any]) -> float:
    return line["rollout/idle_fraction"]


if __name__ == "__main__":
    emit(measure(steps=16 if QUICK else 40))
