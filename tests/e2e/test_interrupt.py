"""Ctrl-C and SIGTERM at every phase: the run ends by itself, no process remains, and the store opens clean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from replay.reader import StoreReader
from replay.schema import CONSUMPTION_FILE
from tests.e2e.runs import COMMAND, CONFIG, REPOSITORY

pytestmark = pytest.mark.engine
ENOUGH_S = 20.0
SHORT = ("tracking.wandb=off", "task.eval_prompts=64", "learner.steps=200")


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(CONFIG), f"run_dir={folder}", "name=run", *SHORT],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def await_line(run: subprocess.Popen[str], text: str) -> None:
    """Read the run's output until a line holds ``text``."""
    assert run.stdout is not None
    lines = []
    for line in run.stdout:
        lines.append(line)
        if text in line:
            return
    raise AssertionError("".join(lines))


def family(run: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(run.pid).children(recursive=True)


@pytest.mark.parametrize(
    ("phase", "number"),
    [("Ray", signal.SIGINT), ("1 engine", signal.SIGINT), ("first groups", signal.SIGTERM), ("step  ", signal.SIGINT)],
)
def test_an_interrupted_run_leaves_no_process_and_a_clean_store(phase: str, number: int, tmp_path: Path):
    run = start(tmp_path)
    await_line(run, phase)
    time.sleep(0.5)
    processes = family(run)
    os.kill(run.pid, number)
    output, _ = run.communicate(timeout=120)
    ended_s = time.monotonic()
    assert run.returncode == 130, output
    while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
        assert time.monotonic() - ended_s < ENOUGH_S, [p for p in processes if p.is_running()]
        time.sleep(0.1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    if (tmp_path / "run" / "replay" / CONSUMPTION_FILE).exists():
        with StoreReader(tmp_path / "run" / "replay") as store:
            assert list(store.verify()) == []
            assert store.version == summary["steps"]
