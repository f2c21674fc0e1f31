import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from r2vpo.job import reaper
from r2vpo.job.reaper import descendants

SLEEP = "import time; time.sleep(600)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); time.sleep(600)"
DRIVER = f"""
import subprocess, sys, time
from r2vpo.job import reaper
helper = reaper.Reaper("the/logs", look_s=0.1, grace_s=0.2)
subprocess.Popen([sys.executable, "-c", {PARENT!r}], start_new_session=True)
print(helper._process.pid, flush=True)
{{after}}
"""


def until(holds) -> None:
    """Wait for ``holds()``, not for ever."""
    for _ in range(300):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def num_held(helper: psutil.Process) -> int:
    """Processes that a reaper keeps an eye on."""
    return sum("pidfd" in os.readlink(path) for path in Path(f"/proc/{helper.pid}/fd").iterdir())


@pytest.fixture
def start():
    started: list[psutil.Process] = []

    def start(after: str) -> tuple[subprocess.Popen[str], psutil.Process, list[psutil.Process]]:
        """A driver with a reaper and, below it, a process and that one's child."""
        command = [sys.executable, "-c", DRIVER.format(after=after)]
        driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        helper = psutil.Process(int(driver.stdout.readline()))
        me = psutil.Process(driver.pid)
        until(lambda: len(me.children(recursive=True)) == 3)
        below = [p for p in me.children(recursive=True) if p != helper]
        started.extend([me, helper, *below])
        return driver, helper, below

    yield start
    for process in started:
        if alive(process):
            process.kill()


def test_what_a_killed_driver_leaves_behind_is_ended(start):
    driver, helper, below = start("time.sleep(600)")
    until(lambda: num_held(helper) == 2)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    until(lambda: not any(alive(p) for p in below))
    until(lambda: not alive(helper))
    assert re.fullmatch(
        rf"r2vpo: error: the driver \(process {driver.pid}\) was killed, or .*; see the/logs\n", driver.stderr.read()
    )


def test_a_reaper_that_is_let_go_ends_as_soon_as_nothing_is_left(start):
    driver, helper, below = start("time.sleep(1); helper.close(); time.sleep(600)")
    for process in below:
        process.kill()
    until(lambda: not alive(helper))
    assert driver.poll() is None
    driver.kill()
    assert driver.communicate()[1] == ""


def test_descendants_are_found_at_every_depth_and_nobody_else():
    with subprocess.Popen([sys.executable, "-c", PARENT]) as parent:
        me = psutil.Process(parent.pid)
        until(me.children)
        assert descendants(parent.pid) == {me.children()[0].pid}
        assert {parent.pid, me.children()[0].pid} <= descendants(os.getpid())
        assert os.getpid() not in descendants(os.getpid())
        for process in [*me.children(), me]:
            process.kill()


def test_a_name_with_parentheses_does_not_confuse_the_search(tmp_path, monkeypatch):
    for number, stat in {7: "7 (a) R 9 (b) S 3 7 7", 8: "8 (python) S 7 8 8", 9: "9 (x) S 1 9 9"}.items():
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "stat").write_text(stat)
    (tmp_path / "self").mkdir()
    monkeypatch.setattr(reaper, "PROC", tmp_path)
    assert descendants(3) == {7, 8}
