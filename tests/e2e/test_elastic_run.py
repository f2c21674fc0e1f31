"""A run is told, by the commands a person would give, to grow, to shrink, to save and to stop, while it trains."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from r2vpo.cli import main
from r2vpo.job import status
from r2vpo.job.status import RunStatus
from tests.faults.victims import Run

pytestmark = pytest.mark.engine
WAIT_S = 240.0


def await_workers(run: Run, count: int) -> RunStatus:
    """The status of the run once so many workers generate with proven weights, and nobody else is there."""
    until_s = time.monotonic() + WAIT_S
    while True:
        said = status.read(run.folder / "status.json")
        workers = [c for c in said.components if c.role == "rollout"] if said else []
        ready = [c for c in workers if c.state == "serving" and c.version is not None]
        if said is not None and len(ready) == len(workers) == count:
            return said
        assert time.monotonic() < until_s, workers
        time.sleep(0.2)


def told(capsys, *command: str) -> dict:
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_grows_shrinks_saves_and_stops_as_it_is_told_and_loses_nothing(tmp_path: Path, capsys):
    run = Run(tmp_path, "task.eval_prompts=64", "learner.steps=4000", "learner.checkpoint_every=0")
    name = str(run.folder)
    run.await_steps(2)
    answer = told(capsys, "scale", name, "--rollout", "2")
    assert (answer["before"], answer["after"]) == (1, 2)
    before = await_workers(run, 2)
    assert [c.name for c in before.components if c.role == "rollout"] == ["rollout-0", "rollout-1"]
    run.await_steps(len(run.steps()) + 2)
    assert told(capsys, "drain", name, "rollout-0")["text"] == "rollout-0 finishes its groups and goes; 1 remain"
    after = await_workers(run, 1)
    assert [c.name for c in after.components if c.role == "rollout"] == ["rollout-1"]
    assert after.target_workers == 1
    step = told(capsys, "checkpoint", name)["step"]
    assert (run.folder / "checkpoints" / f"step-{step:06d}" / "COMPLETE").is_file()
    assert main(["stop", name]) == 0
    code, output = run.end()
    assert code == 130, output
    assert "Traceback" not in output
    assert run.summary()["restarts"] == {"rollout": 0, "learner": 0, "shard": 0, "job": 0}
    assert run.steps() == list(range(run.summary()["steps"]))
    assert run.audit().violations == ()
