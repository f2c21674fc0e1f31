"""A process is killed in the middle of a run. A replay shard is started again; any other ends the run: one sentence
names it, nothing remains, and ``--resume`` goes on.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from replay.reader import StoreReader
from replay.rows import by_shard
from tests.faults.victims import Run

pytestmark = [pytest.mark.engine, pytest.mark.faults]
STEPS = 14
SHORT = ("task.eval_prompts=64", f"learner.steps={STEPS}", "learner.checkpoint_every=2", "replay.shards=2")
SENTENCES = {
    "ray::LearnerRank": "learner-0 died: its process was killed or crashed",
    "ray::RolloutActor": "rollout-0 died: its process was killed or crashed",
    "VLLM::EngineCore": "rollout-0 failed: vLLM's engine died",
    "ray::ReplayService": "replay store died: its process was killed or crashed",
    "ray::WeightBoard": "weight board died: its process was killed or crashed",
}
EVERY_RUN = "ray::LearnerRank"
"""The one that is killed on every occasion; the others take minutes and do it when they are asked for."""


def check_continuation(first: Run, tmp_path: Path) -> None:
    """``--resume`` trains to the end, as if nothing had been."""
    before = first.summary()["eval"]["before"]
    assert before["accuracy"] is not None
    second = Run(tmp_path, *SHORT, "--resume")
    code, output = second.end()
    assert code == 0, output
    assert second.steps() == list(range(STEPS))
    assert second.check_store() == STEPS
    summary = second.summary()
    assert (summary["status"], summary["steps"], summary["version"]) == ("finished", STEPS, STEPS)
    assert summary["eval"]["before"] == before
    assert "error" not in summary
    assert AutoModelForCausalLM.from_pretrained(second.folder / "model").num_parameters() > 0


@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=[] if t == EVERY_RUN else pytest.mark.slow) for t in SENTENCES]
)
def test_a_killed_component_ends_the_run_with_its_name_and_the_run_goes_on_later(title: str, tmp_path: Path):
    run = Run(tmp_path, *SHORT)
    run.await_steps(3)
    ray_files = Path(os.readlink(run.folder / "logs" / "ray")).parents[1]
    assert ray_files.is_dir()
    run.kill(title)
    code, output = run.end()
    assert code == 1, output
    sentence = SENTENCES[title]
    assert sum(sentence in line for line in output.splitlines()) == 1, output
    assert "Traceback" not in output
    assert "actor_id" not in output
    summary = run.summary()
    assert summary["status"] == "failed"
    assert summary["error"].startswith(sentence)
    assert "Traceback" in (run.folder / "logs" / "error.log").read_text()
    assert not ray_files.exists()
    assert (run.folder / "logs" / "ray" / "raylet.out").is_file()
    # The store may be a step ahead: that step was committed, and its metrics were still to come.
    assert run.check_store() - len(run.steps()) in (0, 1)
    check_continuation(run, tmp_path)


def test_killed_shards_are_started_again_on_their_files_and_the_run_finishes(tmp_path: Path):
    run = Run(tmp_path, *SHORT, "learner.steps=24")
    for steps in (3, 10):
        run.await_steps(steps)
        run.await_processes("ray::ShardHost", 2)
        run.kill("ray::ShardHost", one_of=2)
    code, output = run.end()
    assert code == 0, output
    assert "Traceback" not in output
    died = re.findall(
        r"^note: (replay shard [01]) died; restarting it on its file \([12] of 3 within 10 min\)$", output, re.M
    )
    assert len(died) == 2, output
    assert re.findall(r"^note: (replay shard [01]) is back after", output, re.M) == died
    assert run.steps() == list(range(24))
    assert run.check_store() == 24
    assert run.summary()["status"] == "finished"
    with StoreReader(run.folder / "replay") as store:
        ids = [sampled.group_id for step in range(24) for sampled in store.batch(step).groups]
        assert store.stats().groups >= run.metrics()[-1]["replay/groups"]
    assert len(ids) == sum(metrics["train/groups"] for metrics in run.metrics())
    assert set(by_shard(ids, 2)) == {0, 1}


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
    assert run.check_store() >= 3
    check_continuation(run, tmp_path)
    assert not ray_files.exists()


@pytest.mark.slow
def test_a_run_without_checkpoints_goes_on_after_an_interrupt_and_again_when_asked_for_more(tmp_path: Path):
    run = Run(tmp_path, "task.eval_prompts=64", "learner.checkpoint_every=0", "learner.steps=500")
    run.await_steps(3)
    run.interrupt()
    code, output = run.end()
    assert code == 130, output
    done = len(run.steps())
    weights = (run.folder / "model" / "model.safetensors").read_bytes()
    for steps in (done + 3, done + 6):
        again = Run(
            tmp_path, "task.eval_prompts=64", "learner.checkpoint_every=0", f"learner.steps={steps}", "--resume"
        )
        code, output = again.end()
        assert code == 0, output
        assert again.steps() == list(range(steps))
        assert again.check_store() == steps
        assert again.summary()["status"] == "finished"
        assert again.summary()["eval"]["before"] == run.summary()["eval"]["before"]
        weights, old = (run.folder / "model" / "model.safetensors").read_bytes(), weights
        assert weights != old
        assert sorted(p.name for p in run.folder.glob("model*")) == ["model"]
