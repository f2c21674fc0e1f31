"""A run of the real command line, with all its processes, some of which are about to be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

from replay.service import SHARD
from replay.store import ReplayStore
from tests.e2e.runs import COMMAND, CONFIG, REPOSITORY

GONE_S = 20.0
"""Longest time that a process may outlive its run (seconds)."""
START_S = 300.0
"""Longest time from the command to the steps that a test waits for (seconds)."""


class Run:
    """``r2vpo train`` on the quickstart's recipe, in the background."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder / "run"
        self._process = subprocess.Popen(
            [*COMMAND, str(CONFIG), f"run_dir={folder}", "name=run", "tracking.wandb=off", *overrides],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.family: list[psutil.Process] = []
        """All its processes, as of the last ``await_steps``."""

    def await_steps(self, count: int) -> None:
        """Return once ``count`` learner steps are recorded."""
        until_s = time.monotonic() + START_S
        while len(self.steps()) < count:
            assert self._process.poll() is None, self._process.communicate()[0]
            assert time.monotonic() < until_s, f"no {count} steps within {START_S:g} s"
            time.sleep(0.02)
        driver = psutil.Process(self._process.pid)
        self.family = [driver, *driver.children(recursive=True)]

    def kill(self, title: str) -> None:
        """SIGKILL to the process with this title; ``driver`` is the command itself."""
        victims = [p for p in self.family if title in " ".join(p.cmdline())] if title != "driver" else self.family[:1]
        assert len(victims) == 1, [p.cmdline() for p in self.family]
        victims[0].kill()

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self._process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Exit code and output, once all processes are gone."""
        output, _ = self._process.communicate(timeout=START_S)
        ended_s = time.monotonic()
        while left := [p for p in self.family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() - ended_s < GONE_S, [(p.pid, p.cmdline()) for p in left]
            time.sleep(0.1)
        return self._process.returncode, output

    def steps(self) -> list[int]:
        """The numbers of the steps in metrics.jsonl."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return json.loads((self.folder / "summary.json").read_text())

    def check_store(self) -> int:
        """The store's version, once everything in it has been read and found sound."""
        store = ReplayStore.read_only(self.folder / "replay" / SHARD)
        try:
            assert store.verify() == []
            return store.version
        finally:
            store.close()
