"""Runs of the real command line on the shipped quickstart model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
QUICKSTART = REPOSITORY / "assets" / "quickstart-model"
COMMAND = (sys.executable, "-m", "r2vpo", "train")
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"


def train(folder: Path, *overrides: str, timeout_s: float = 300) -> Path:
    """Run the quickstart's recipe with ``overrides`` to its end and return the folder of the run."""
    done = subprocess.run(
        [*COMMAND, str(CONFIG), f"run_dir={folder}", "name=run", "tracking.wandb=off", *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return folder / "run"
