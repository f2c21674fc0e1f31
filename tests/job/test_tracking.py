import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from r2vpo.job.config import RunConfig, TrackingConfig, to_yaml
from r2vpo.job.rundir import RunDir
from r2vpo.job.tracking import Tracker, read_metrics

FAKE_WANDB = """
import json, os, sys, time
from pathlib import Path
OUT = Path(os.environ["FAKE_WANDB_OUT"])
{extra}
def say(*words):
    with OUT.open("a") as file:
        print(*words, file=file, flush=True)
def login(**options): return {has_key}
def Settings(**options): return options
class Run:
    url = "a-url"
    dir = os.path.abspath("wandb/offline-run-1/files")
    def log(self, metrics, step): say("log", step, json.dumps(metrics))
    def finish(self): say("finish")
def init(*, mode, name, **options):
    {on_init}
    say("init", mode, name, os.environ["WANDB_PROJECT"])
    return Run()
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """Puts a module `wandb` in the mirror's way that writes what it is told into a file."""
    folder = tmp_path / "fake"
    folder.mkdir()
    out = tmp_path / "wandb.txt"
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("FAKE_WANDB_OUT", str(out))
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def install(*, has_key: bool = False, on_init: str = "pass", extra: str = "") -> Path:
        (folder / "wandb.py").write_text(FAKE_WANDB.format(has_key=has_key, on_init=on_init, extra=extra))
        return out

    return install


@pytest.fixture
def run(tmp_path, config: RunConfig):
    with RunDir.create(tmp_path / "runs", "toy") as run:
        run.write_config(to_yaml(config))
        yield run


def with_mode(config: RunConfig, mode: str) -> RunConfig:
    return replace(config, tracking=TrackingConfig(wandb=mode, project="sums"))


def track(config: RunConfig, run: RunDir, mode: str, *, steps: int = 3, timeout_s: float = 60.0) -> list[str]:
    """A whole life of a tracker; returns what the user was told."""
    notes: list[str] = []
    tracker = Tracker(with_mode(config, mode), run, note=notes.append)
    for step in range(steps):
        tracker.step({"step": step, "reward": step / 2})
    tracker.close(timeout_s=timeout_s)
    tracker.close(timeout_s=timeout_s)
    assert [metrics["step"] for metrics in read_metrics(run.metrics)] == list(range(steps))
    return notes


def test_metrics_are_one_json_object_per_step_without_nan(config, run):
    tracker = Tracker(with_mode(config, "off"), run, note=pytest.fail)
    tracker.step({"step": 0, "a": math.nan, "b": -math.inf, "λ": 0.5, "c": None, "n": 3})
    assert (
        run.metrics.read_text() == '{"step": 0, "a": null, "b": null, "λ": 0.5, "c": null, "n": 3}\n'
    )  # on disk at once
    tracker.close()


def test_a_resumed_run_rewrites_the_steps_it_repeats_and_drops_half_a_line(config, run):
    run.metrics.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"step": 3, "rew')
    assert [metrics["step"] for metrics in read_metrics(run.metrics)] == [0, 1, 2]
    tracker = Tracker(with_mode(config, "off"), run, resume_step=2, note=pytest.fail)
    tracker.step({"step": 2, "again": True})
    tracker.close()
    assert read_metrics(run.metrics) == [{"step": 0}, {"step": 1}, {"step": 2, "again": True}]


def test_a_run_without_metrics_has_none(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_wandb_gets_every_step_and_is_finished(config, run, fake_wandb):
    out = fake_wandb()
    [note] = track(config, run, "auto")
    assert "W&B is offline; `wandb sync" in note
    assert out.read_text().splitlines() == [
        "init offline toy sums",
        'log 0 {"step": 0, "reward": 0.0}',
        'log 1 {"step": 1, "reward": 0.5}',
        'log 2 {"step": 2, "reward": 1.0}',
        "finish",
    ]


def test_wandb_is_online_where_there_is_a_key(config, run, fake_wandb):
    out = fake_wandb(has_key=True)
    assert track(config, run, "auto") == ["W&B: a-url"]
    assert "init online" in out.read_text()


def test_the_environment_decides_for_auto(config, run, fake_wandb, monkeypatch):
    out = fake_wandb(has_key=True)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert track(config, run, "auto") == []
    assert not out.exists()


def test_without_a_network_wandb_goes_offline(config, run, fake_wandb):
    out = fake_wandb(on_init='if mode == "online": raise TimeoutError("no route\\nat all")')
    notes = track(config, run, "online")
    assert notes[0] == "W&B is offline, it could not be reached: no route"
    assert out.read_text().splitlines()[0] == "init offline toy sums"
    assert out.read_text().count("log ") == 3


@pytest.mark.parametrize(
    "broken",
    [{"extra": "raise ImportError('broken')"}, {"on_init": "raise ValueError('broken')"}, {"on_init": "os._exit(9)"}],
    ids=["import", "init", "crash"],
)
def test_a_broken_wandb_costs_one_sentence(config, run, fake_wandb, broken):
    fake_wandb(**broken)
    [note] = track(config, run, "offline")
    assert note.startswith("W&B is off: its process ended with code")
    assert str(run.logs / "wandb.log") in note


def test_a_wandb_that_hangs_is_ended(config, run, fake_wandb):
    fake_wandb(on_init="time.sleep(1000)")
    notes = track(config, run, "offline", steps=200, timeout_s=0.2)
    assert notes == ["W&B did not take over the last metrics in time and was ended; metrics.jsonl has them all"]


def test_off_starts_no_process(config, run, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("started a process"))
    assert track(config, run, "off") == []


def test_the_mirror_ends_when_the_job_is_killed(config, run, fake_wandb):
    out = fake_wandb()
    job = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from r2vpo.job.config import load_config
        from r2vpo.job.rundir import RunDir
        from r2vpo.job.tracking import Tracker
        run = RunDir(Path(sys.argv[1]))
        tracker = Tracker(load_config(run.config, ["tracking.wandb=offline"]), run, note=print)
        tracker.step({"step": 0})
        print("ready", flush=True)
        time.sleep(1000)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", job, str(run.path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s and not (out.exists() and "finish" in out.read_text()):
        time.sleep(0.05)
    assert out.read_text().splitlines() == ["init offline toy r2vpo", 'log 0 {"step": 0}', "finish"]


def test_the_real_wandb_keeps_the_run_offline_without_a_key(config, run, monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key in ~/.netrc
    [note] = track(config, run, "auto")
    assert "W&B is offline; `wandb sync" in note
    [file] = run.path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"reward" in file.read_bytes()


def test_metrics_for_which_the_disk_has_no_room_wait_as_whole_lines(run, config):
    """A limit on the size of a file stands for the disk: both take a part of a line, and then nothing."""
    off = replace(config, tracking=TrackingConfig(wandb="off"))
    notes: list[str] = []
    tracker = Tracker(off, run, note=notes.append)
    tracker.step({"step": 0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics.stat().st_size + 5, before[1]))
    try:
        for step in (1, 2, 3):
            tracker.step({"step": step})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run.metrics.read_text() == '{"step": 0}\n'
    assert notes == [f"{run.metrics} cannot be written: File too large; the metrics wait for the next step"]
    tracker.go_back(3)
    assert run.metrics.read_text() == '{"step": 0}\n'
    tracker.step({"step": 3})
    tracker.close()
    assert [metrics["step"] for metrics in read_metrics(run.metrics)] == [0, 1, 2, 3]
