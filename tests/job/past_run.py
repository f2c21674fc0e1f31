"""The folder of a run that is over, as far as a recomputation looks at it: no store, no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from learner import checkpoint
from r2vpo.job.config import load_config, to_yaml
from r2vpo.job.history import record_start
from r2vpo.job.rundir import RunDir

STATE = {"seed": 0, "ranks": 1, "zero_stage": 0, "dtype": "float32"}


class PastRun:
    """Ten steps, 0 to 9, of one start at step 0; no checkpoint yet."""

    def __init__(self, recipe: Path, root: Path) -> None:
        self.recipe = recipe
        self.dir = RunDir.create(root, "past")
        self.dir.close()
        self.write_metrics([{"step": step, "step/loss": step / 10, "train/tokens": 64.0} for step in range(10)])
        self.start()

    def start(self, *overrides: str, resume: bool = False) -> None:
        """Another start with these settings, from the newest checkpoint if it is a resume."""
        config = load_config(self.recipe, overrides)
        self.dir.write_config(to_yaml(config))
        record_start(self.dir, config, resume=resume)

    def add_checkpoint(self, step: int, **changed: Any) -> Path:
        """A complete checkpoint after ``step`` steps."""
        checkpoint.begin(self.dir.checkpoints, step)
        return checkpoint.commit(self.dir.checkpoints, step, STATE | {"version": step} | changed)

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """The whole metrics.jsonl."""
        self.dir.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
