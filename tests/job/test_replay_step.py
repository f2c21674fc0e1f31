from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from learner import checkpoint
from learner.checkpoint import read_state
from r2vpo import cli
from r2vpo.job import replay_step, step_plan
from r2vpo.job.history import NAME
from r2vpo.job.replay_step import StepProgress
from r2vpo.records import SampledBatch
from replay.errors import ReplayError
from tests.job.past_run import PastRun

FLOAT32 = 1e-6


class FakeStore:
    """The run's store, in which the payloads of some steps are missing."""

    def __init__(self) -> None:
        self.missing: dict[int, str] = {}
        self.gaps: list[str] = []
        self.directory = Path("replay")

    def batch(self, step: int) -> SampledBatch:
        if step in self.missing:
            raise ReplayError(f"the batch of step {step} is incomplete: {self.missing[step]}")
        return SampledBatch(step=step, groups=())

    def __enter__(self) -> FakeStore:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class FakeLearners:
    """Stands where the real recomputation would bring Ray in: it gives what was recorded, except for ``changed``."""

    def __init__(self) -> None:
        self.plans = []
        self.changed: dict[int, dict[str, float]] = {}
        self.is_interrupted = False
        self.meanwhile = lambda: None

    def recompute(self, plan, batch_of, *, progress):
        self.plans.append(plan)
        self.meanwhile()
        if plan.checkpoint is not None:
            assert read_state(plan.checkpoint)["version"] == plan.steps.start
        if self.is_interrupted:
            return None
        metrics = {}
        for step in plan.steps:
            assert batch_of(step).step == step
            metrics[step] = {k: v for k, v in plan.recorded[step].items() if k != "step"} | self.changed.get(step, {})
        return SimpleNamespace(metrics=metrics, rounding=FLOAT32)


@pytest.fixture
def past(recipe, runs):
    run = PastRun(recipe, runs)
    run.add_checkpoint(4)
    return run


@pytest.fixture
def store(monkeypatch):
    fake = FakeStore()
    monkeypatch.setattr(replay_step, "StoreReader", lambda directory: fake)
    return fake


@pytest.fixture
def learners(monkeypatch, store):
    fake = FakeLearners()
    module = ModuleType("r2vpo.job.recompute")
    module.recompute = fake.recompute  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "r2vpo.job.recompute", module)
    return fake


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_step_that_gives_the_same_ends_with_0_and_leaves_the_run_alone(past, learners, capsys):
    before = files(past.dir.path)
    assert cli.main(["replay-step", str(past.dir.path), "--step", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == (
        "step 5, recomputed from checkpoint step-000004 through 2 steps, is the same: all 2 metrics are identical to "
        "the last bit"
    )
    assert ["step/loss", "0.5", "0.5", "0", "identical"] in [line.split() for line in out.splitlines()]
    assert "recomputing 2 steps, 4 to 5, from checkpoint step-000004" in err
    assert files(past.dir.path) == before


def test_a_step_that_differs_ends_with_1_and_names_the_first_one_on_the_way(past, learners, capsys):
    learners.changed = {6: {"step/loss": 0.61}, 7: {"step/loss": 0.75}}
    assert cli.main(["replay-step", str(past.dir.path), "--step", "7"]) == 1
    out = capsys.readouterr().out
    assert "step 6 on the way: 1 of 2 differ, step/loss 0.6 recorded, 0.61 recomputed" in out
    assert "step 5 on the way" not in out
    assert "DIFFERS in 1 of 2 metrics; first at step 6: on the same batch, step/loss 0.6 recorded" in out


def test_what_is_not_as_it_was_is_said_beside_the_result(past, learners, capsys):
    (past.dir.path / NAME).unlink()
    assert cli.main(["replay-step", str(past.dir.path), "--step", "5"]) == 0
    assert "note: " + str(past.dir.path) + " has no history.jsonl" in capsys.readouterr().out


def test_the_result_as_json_holds_every_metric_and_every_step(past, learners, capsys):
    learners.changed = {5: {"train/tokens": 60.0}}
    assert cli.main(["replay-step", str(past.dir.path), "--step", "6", "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["same"], result["rounding"]) == (6, False, FLOAT32)
    assert result["origin"].endswith("checkpoints/step-000004")
    assert result["first_difference"] == {"step": 5, "metrics": ["train/tokens"]}
    assert [(s["step"], s["same"], s["identical"]) for s in result["steps"]] == [
        (4, True, 2),
        (5, False, 1),
        (6, True, 2),
    ]
    assert result["metrics"]["step/loss"] == {"recorded": 0.6, "recomputed": 0.6, "verdict": "identical"}


def test_a_batch_that_is_not_all_there_is_named_before_anything_heavy_starts(past, store, learners, capsys):
    store.missing = {5: "group 17 was evicted"}
    assert cli.main(["replay-step", str(past.dir.path), "--step", "6"]) == 2
    assert "the batch of step 5 is incomplete: group 17 was evicted; step 6 cannot be" in capsys.readouterr().err
    assert learners.plans == []


def test_a_shard_on_another_host_is_named_instead_of_each_of_its_groups(past, store, learners, capsys):
    store.missing = {4: "group 2 cannot be read; group 4 cannot be read"}
    store.gaps = ["shard 1 of 2 is not here: shard-001.sqlite3 lies on host b"]
    assert cli.main(["replay-step", str(past.dir.path), "--step", "6"]) == 2
    error = capsys.readouterr().err
    assert "lies on host b; the batch of step 4 has groups there" in error
    assert "group 2" not in error


def test_a_run_that_removes_the_checkpoint_meanwhile_does_no_harm(past, learners, capsys):
    def go_on():
        past.add_checkpoint(8)
        checkpoint.prune(past.dir.checkpoints, keep=1)

    learners.meanwhile = go_on
    assert cli.main(["replay-step", str(past.dir.path), "--step", "5"]) == 0
    assert "recomputed from checkpoint step-000004" in capsys.readouterr().out
    assert [path.name for path in past.dir.checkpoints.iterdir()] == ["step-000008"]


def test_nothing_of_the_checkpoint_is_left_after_a_failure_or_an_interrupt(past, learners, store, monkeypatch):
    before = files(past.dir.path)

    def interrupt(reader, plan):
        raise KeyboardInterrupt

    store.missing = {5: "group 17 was evicted"}
    assert cli.main(["replay-step", str(past.dir.path), "--step", "6"]) == 2
    assert files(past.dir.path) == before
    monkeypatch.setattr(replay_step, "check_batches", interrupt)
    assert cli.main(["replay-step", str(past.dir.path), "--step", "6"]) == 130
    assert files(past.dir.path) == before


@pytest.mark.parametrize("moment", ["before it is read", "before it is pinned"])
def test_a_checkpoint_that_is_removed_too_soon_is_one_sentence(past, learners, capsys, monkeypatch, moment):
    def remove_first(call):
        def wrapped(path):
            checkpoint._remove(path)
            return call(path)

        return wrapped

    module, name = {"before it is read": (step_plan, "read_state"), "before it is pinned": (replay_step, "pinned")}[
        moment
    ]
    monkeypatch.setattr(module, name, remove_first(getattr(module, name)))
    assert cli.main(["replay-step", str(past.dir.path), "--step", "5"]) == 2
    error = capsys.readouterr().err
    assert "step-000004 was removed while it was read" in error
    assert "raise learner.keep_checkpoints, or use a later step" in error
    assert error.count("\n") == 1
    assert learners.plans == []


def test_no_room_for_a_copy_of_the_checkpoint_is_one_sentence(past, learners, capsys, monkeypatch):
    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    assert cli.main(["replay-step", str(past.dir.path), "--step", "5"]) == 2
    error = capsys.readouterr().err
    assert "step-000004 cannot be linked or copied" in error
    assert "No space left on device" in error
    assert error.count("\n") == 1


def test_a_missing_batch_that_no_step_needs_does_no_harm(past, store, learners):
    store.missing = {3: "group 17 was evicted", 8: "group 40 is damaged"}
    assert cli.main(["replay-step", str(past.dir.path), "--step", "7"]) == 0


def test_an_interrupted_one_ends_with_130_and_no_verdict(past, learners, capsys):
    learners.is_interrupted = True
    assert cli.main(["replay-step", str(past.dir.path), "--step", "5"]) == 130
    assert capsys.readouterr().out == ""


def test_it_has_a_private_ray_unless_an_address_is_given(past, learners):
    past.start("ray.address=auto")  # that of the run does not count: its cluster may be gone
    cli.main(["replay-step", str(past.dir.path), "--step", "5"])
    cli.main(["replay-step", str(past.dir.path), "--step", "5", "--ray-address", "head:6379"])
    assert [plan.segments[0].config.ray.address for plan in learners.plans] == [None, "head:6379"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--step", "99"], "has not recorded this step"),
        (["--step", "-1"], "-1 is not the number of a step"),
        (["--step", "x"], "x is not the number of a step"),
        ([], "--step"),
        (["--step", "5", "learner.lr=1"], "learner.lr=1 is one argument too many"),
        (["--step", "5", "--lr=1"], "unknown option --lr; see r2vpo replay-step --help"),
        (["--step", "5", "--checkpoint", "none"], "--checkpoint none: none is not a complete checkpoint"),
    ],
    ids=str,
)
def test_bad_input_ends_in_one_sentence(past, learners, capsys, arguments, part):
    assert cli.main(["replay-step", str(past.dir.path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert part in captured.err
    assert learners.plans == []


def test_bad_input_imports_nothing_heavy(past):
    heavy = {"ray", "torch", "vllm", "deepspeed", "transformers", "pyarrow"}
    code = (
        "import sys; from r2vpo import cli; "
        f"code = cli.main(['replay-step', {str(past.dir.path)!r}, '--step', '99']); "
        f"print(sorted({heavy!r} & set(sys.modules))); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n"), done.stderr


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    progress = StepProgress()
    for now_s in (0.0, 1.0, 4.9, 5.0):
        progress.step(int(now_s), done=int(now_s), total=9)
    assert capsys.readouterr().err == "r2vpo: step 0 (1 of 9)\nr2vpo: step 5 (6 of 9)\n"
