"""A run of the real command line, with all its processes, some of which are about to be killed, stopped or watched."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from r2vpo.job.replay_audit import audit_run
from r2vpo.job.rundir import RunDir
from replay.audit import Audit
from replay.reader import StoreReader
from tests.e2e.runs import COMMAND, CONFIG, REPOSITORY
from tests.faults.acknowledged import recording, write_record

GONE_S = 20.0
"""Longest time that a process may outlive its run (seconds)."""
START_S = 300.0
"""Longest time from the command to the steps that a test waits for (seconds)."""


STARTED: list[subprocess.Popen[bytes]] = []
"""The drivers of all runs; those that outlive their test are ended after it (``tests/conftest.py``)."""


class Run:
    """``r2vpo train`` on the quickstart's recipe, in the background."""

    def __init__(self, folder: Path, *overrides: str, engine_process: bool = False) -> None:
        """``folder`` holds the run, and what is recorded of it; ``engine_process``: engines have one of their own."""
        self.folder = folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        self._printed = folder / f"output-{time.time_ns()}"
        self._process = subprocess.Popen(
            [*COMMAND, str(CONFIG), f"run_dir={folder}", "name=run", "tracking.wandb=off", *overrides],
            cwd=REPOSITORY,
            env=recording(folder / "recording", engine_process=engine_process),
            stdout=self._printed.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        STARTED.append(self._process)
        self.family: list[psutil.Process] = []
        """All its processes, as of the last ``await_…``."""

    def await_steps(self, count: int) -> None:
        """Return once ``count`` learner steps are recorded."""
        until_s = time.monotonic() + START_S
        while len(self.steps()) < count:
            assert self._process.poll() is None, self._printed.read_text()
            assert time.monotonic() < until_s, f"no {count} steps within {START_S:g} s"
            time.sleep(0.02)
        self.look()

    def await_processes(self, title: str, count: int) -> None:
        """Return once so many processes have this title."""
        until_s = time.monotonic() + START_S
        while len(self.titled(title)) != count:
            assert time.monotonic() < until_s, [p.cmdline() for p in self.family]
            time.sleep(0.1)
            self.look()

    def kill(self, title: str, *, one_of: int = 1, by: signal.Signals = signal.SIGKILL) -> None:
        """A signal to the process with this title, the first of so many; ``driver`` is the command itself."""
        victims = self.titled(title) if title != "driver" else self.family[:1]
        assert len(victims) == one_of, [p.cmdline() for p in self.family]
        victims[0].send_signal(by)

    def await_output(self, pattern: str) -> None:
        """Return once the run has printed what matches ``pattern``."""
        until_s = time.monotonic() + START_S
        while not re.search(pattern, self._printed.read_text()):
            assert self._process.poll() is None, self._printed.read_text()
            assert time.monotonic() < until_s, f"no {pattern} within {START_S:g} s: {self._printed.read_text()}"
            time.sleep(0.05)
        self.look()

    def look(self) -> None:
        """See who is there now; who was there last if the driver is gone."""
        with suppress(psutil.NoSuchProcess):
            driver = psutil.Process(self._process.pid)
            self.family = [driver, *driver.children(recursive=True)]

    def titled(self, title: str) -> list[psutil.Process]:
        """Those of ``family`` that have this title."""

        def is_titled(process: psutil.Process) -> bool:
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                return title in " ".join(process.cmdline())
            return False

        return [process for process in self.family if is_titled(process)]

    @property
    def exit_code(self) -> int | None:
        """None while the run goes on."""
        return self._process.poll()

    def printed(self) -> str:
        """What it has printed since it was started."""
        return self._printed.read_text()

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self._process.pid, signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Exit code and output, once all processes are gone."""
        self._process.wait(timeout=START_S)
        ended_s = time.monotonic()
        while left := [p for p in self.family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
            assert time.monotonic() - ended_s < GONE_S, [(p.pid, p.cmdline()) for p in left]
            time.sleep(0.1)
        return self._process.returncode, self._printed.read_text()

    def metrics(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds."""
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        return [json.loads(line) for line in lines]

    def steps(self) -> list[int]:
        """The numbers of the steps in metrics.jsonl."""
        return [metrics["step"] for metrics in self.metrics()]

    def summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        return json.loads((self.folder / "summary.json").read_text())

    def audit(self) -> Audit:
        """What an independent reader of the run's files finds, acknowledgements that the workers had included."""
        record = write_record(self.folder / "logs", self.folder.parent / "acknowledged")
        return audit_run(RunDir(self.folder), acknowledged=record)

    def check_store(self) -> int:
        """The store's version, once everything in it has been read and found sound."""
        with StoreReader(self.folder / "replay") as store:
            assert list(store.verify()) == []
            return store.version
