"""Processes of a run are killed or stopped while it goes on: the run reaches its end, and an independent reader of its
files finds that nothing acknowledged was lost, nothing trained twice in a step, and every step there once.

The default test kills one of everything that can be replaced; the others take minutes each, and run by ``make drills``.
"""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.faults.victims import Run

pytestmark = [pytest.mark.engine, pytest.mark.faults]
STEPS = 24
SHORT = (
    "task.eval_prompts=64",
    f"learner.steps={STEPS}",
    "learner.checkpoint_every=4",
    "replay.shards=2",
    "supervisor.silent_s=20",
    "supervisor.backoff_s=0.5",
)
KILL, STOP = signal.SIGKILL, signal.SIGSTOP


def check_end(run: Run, steps: int = STEPS) -> str:
    """The run has come to its end, whatever happened on the way; returns what it printed."""
    code, output = run.end()
    assert code == 0, output
    assert "Traceback" not in output
    assert run.steps() == list(range(steps))
    audit = run.audit()
    assert audit.violations == ()
    assert audit.version == steps
    summary = run.summary()
    assert (summary["status"], summary["steps"], summary["version"]) == ("finished", steps, steps)
    assert AutoModelForCausalLM.from_pretrained(run.folder / "model").num_parameters() > 0
    return output


def test_a_worker_a_shard_and_the_learner_are_killed_in_one_run_and_it_reaches_its_end(tmp_path: Path):
    run = Run(tmp_path, *SHORT)
    run.await_steps(5)
    run.kill("ray::RolloutActor")
    run.await_output(r"note: rollout-0 died; replacing it \(1 of 3 within 10 min\)")
    run.await_steps(9)
    run.kill("ray::ShardHost", one_of=2)
    run.await_output(r"note: replay shard [01] is back after")
    run.await_steps(14)
    run.kill("ray::LearnerRank")
    run.await_output(r"note: the learner group is back at step (8|12|16|20) after")
    output = check_end(run)
    assert re.search(r"note: replay shard [01] died; restarting it on its file \(1 of 3 within 10 min\)", output)
    assert re.search(r"note: learner-0 died: .*; another learner group goes on from step \d+ \(1 of 3", output)
    assert run.summary()["restarts"] == {"rollout": 1, "learner": 1, "shard": 1, "job": 0}


@pytest.mark.slow
@pytest.mark.parametrize("by", [KILL, STOP])
@pytest.mark.parametrize(
    ("title", "num", "sentence"),
    [
        ("ray::RolloutActor", 1, r"note: rollout-0 .*; replacing it \(1 of 3"),
        ("ray::ShardHost", 2, r"note: replay shard [01] is back after"),
        ("ray::LearnerRank", 1, r"note: the learner group is back at step"),
        ("ray::ReplayService", 1, r"note: replay store .*; starting all processes again, from step"),
        ("ray::WeightBoard", 1, r"note: weight board .*; starting all processes again, from step"),
    ],
)
def test_a_process_that_is_killed_or_stopped_does_not_end_the_run(title, num, sentence, by, tmp_path: Path):
    run = Run(tmp_path, *SHORT)
    run.await_steps(5)
    run.kill(title, one_of=num, by=by)
    run.await_output(sentence)
    check_end(run)


@pytest.mark.slow
def test_what_dies_again_and_again_ends_the_run_with_its_last_error(tmp_path: Path):
    run = Run(tmp_path, *SHORT, "learner.steps=400", "supervisor.max_restarts=1")
    run.await_steps(3)
    run.kill("ray::LearnerRank")
    run.await_output("the learner group is back at step")
    run.await_steps(3)
    run.kill("ray::LearnerRank")
    code, output = run.end()
    assert code == 1, output
    assert "Traceback" not in output
    sentence = "learner group failed 2 times within 10 min, at last so: learner-0 died"
    assert run.summary()["error"].startswith(sentence)
    assert sum(sentence in line for line in output.splitlines()) == 1, output
    assert "Traceback" in (run.folder / "logs" / "error.log").read_text()
    assert run.audit().violations == ()


@pytest.mark.slow
def test_a_killed_driver_takes_every_process_along_and_the_run_goes_on_later(tmp_path: Path):
    run = Run(tmp_path, *SHORT)
    run.await_steps(3)
    ray_files = Path(os.readlink(run.folder / "logs" / "ray")).parents[1]
    run.kill("driver")
    code, output = run.end()
    assert code == -9
    assert "was killed, or ended by Ray; ending what is left of the run; see" in output
    assert run.summary()["status"] == "running"
    assert run.audit().violations == ()
    before = run.summary()["eval"]["before"]
    again = Run(tmp_path, *SHORT, "--resume")
    check_end(again)
    assert again.summary()["eval"]["before"] == before
    assert not ray_files.exists()


@pytest.mark.slow
def test_a_run_without_checkpoints_goes_on_after_an_interrupt_and_again_when_asked_for_more(tmp_path: Path):
    settings = ("task.eval_prompts=64", "learner.checkpoint_every=0")
    run = Run(tmp_path, *settings, "learner.steps=500")
    run.await_steps(3)
    run.interrupt()
    code, output = run.end()
    assert code == 130, output
    done = len(run.steps())
    weights = (run.folder / "model" / "model.safetensors").read_bytes()
    for steps in (done + 3, done + 6):
        again = Run(tmp_path, *settings, f"learner.steps={steps}", "--resume")
        check_end(again, steps)
        assert again.summary()["eval"]["before"] == run.summary()["eval"]["before"]
        weights, old = (run.folder / "model" / "model.safetensors").read_bytes(), weights
        assert weights != old
        assert sorted(p.name for p in run.folder.glob("model*")) == ["model"]
