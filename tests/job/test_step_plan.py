import shutil
from pathlib import Path

import pytest

from r2vpo.job import step_plan
from r2vpo.job.history import NAME
from r2vpo.job.settings import ConfigError
from r2vpo.job.step_plan import make_plan
from tests.job.past_run import PastRun


@pytest.fixture
def past(recipe, runs):
    return PastRun(recipe, runs)


@pytest.mark.parametrize(("step", "steps"), [(3, range(0, 4)), (4, range(4, 5)), (7, range(4, 8)), (9, range(8, 10))])
def test_it_begins_at_the_newest_checkpoint_at_or_before_the_step(past, step, steps):
    past.add_checkpoint(4)
    past.add_checkpoint(8)
    plan = make_plan(past.dir, step=step)
    assert plan.steps == steps
    assert plan.origin == (f"checkpoint step-00000{steps.start}" if steps.start else "the model itself")
    assert plan.recorded.keys() == set(steps)
    assert plan.notes == ()


def test_a_checkpoint_may_be_named_and_may_lie_elsewhere(past, tmp_path):
    past.add_checkpoint(8)
    saved = tmp_path / "kept"
    shutil.move(past.add_checkpoint(4), saved)
    assert make_plan(past.dir, step=9, checkpoint=saved).steps == range(4, 10)


def test_a_checkpoint_after_the_step_or_half_a_one_is_refused(past):
    late = past.add_checkpoint(4)
    with pytest.raises(ConfigError, match="weights after step 3, which is too late for --step 3"):
        make_plan(past.dir, step=3, checkpoint=late)
    (late / "COMPLETE").unlink()
    with pytest.raises(ConfigError, match=r"--checkpoint .*step-000004 is not a complete checkpoint"):
        make_plan(past.dir, step=9, checkpoint=late)
    assert make_plan(past.dir, step=9).checkpoint is None


def test_a_step_that_was_not_recorded_is_refused(past):
    with pytest.raises(ConfigError, match=r"--step 10: .* its metrics\.jsonl holds steps 0 to 9"):
        make_plan(past.dir, step=10)
    past.write_metrics([])
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is empty"):
        make_plan(past.dir, step=0)


def test_a_gap_on_the_way_is_refused(past):
    past.write_metrics([{"step": step} for step in (0, 1, 3)])
    with pytest.raises(ConfigError, match="step 2 is missing, through which the way to step 3 leads"):
        make_plan(past.dir, step=3)


def test_steps_are_computed_with_the_settings_of_their_start(past):
    past.add_checkpoint(4)
    newer = past.add_checkpoint(8)
    past.start("learner.lr=3e-5", resume=True)
    shutil.rmtree(newer)
    segments = make_plan(past.dir, step=9).segments
    assert [(s.steps, s.config.learner.lr) for s in segments] == [(range(4, 8), 1e-6), (range(8, 10), 3e-5)]


def test_a_resume_that_changes_nothing_of_the_computation_needs_no_second_learner_group(past):
    shutil.rmtree(past.add_checkpoint(4))
    past.start("learner.steps=400", "rollout.workers=3", resume=True)
    assert [s.steps for s in make_plan(past.dir, step=9).segments] == [range(0, 10)]


def test_an_edit_of_the_settings_since_the_start_is_said_and_has_no_effect(past):
    config = past.dir.config
    config.write_text(config.read_text().replace("lr: 1.0e-06", "lr: 0.5"))
    plan = make_plan(past.dir, step=3)
    assert plan.segments[0].config.learner.lr == 1e-6
    assert plan.notes == (
        "config.yaml was changed since the run was started: learner.lr=0.5, was 1e-06, which is used here",
    )


def test_broken_settings_are_said_and_have_no_effect(past):
    past.dir.config.write_text("learner: {lrr: 1}\n")
    (note,) = make_plan(past.dir, step=3).notes
    assert "learner.lrr is not a setting" in note
    assert note.endswith("the settings in history.jsonl are used")


def test_without_a_history_the_settings_are_those_of_the_file_and_must_fit_the_checkpoint(past):
    (past.dir.path / NAME).unlink()
    assert "has no history.jsonl" in make_plan(past.dir, step=3).notes[0]
    past.add_checkpoint(4, zero_stage=2)
    with pytest.raises(ConfigError, match=r"learner\.zero_stage=0 in .*step-000004 was written with .*zero_stage=2"):
        make_plan(past.dir, step=9)


@pytest.mark.parametrize(
    ("changed", "key"),
    [({"seed": 1}, "seed"), ({"ranks": 2}, "learner.ranks")],
    ids=str,
)
def test_a_checkpoint_of_other_settings_is_refused(past, changed, key):
    past.add_checkpoint(4, **changed)
    with pytest.raises(ConfigError, match=f"^{key}=.* in the run's settings"):
        make_plan(past.dir, step=9)


def test_another_library_than_then_is_named(past, monkeypatch):
    here = step_plan.environment()
    monkeypatch.setattr(step_plan, "environment", lambda: here | {"torch": "9.9.9"})
    assert make_plan(past.dir, step=3).notes == (f"torch differs: {here['torch']} when step 3 was trained, 9.9.9 now",)


def test_a_model_that_is_gone_is_named_unless_a_checkpoint_replaces_it(past, model_dir: Path):
    past.add_checkpoint(4)
    shutil.rmtree(model_dir)
    with pytest.raises(ConfigError, match=r"model\.path=.* is gone, from which the first step begins"):
        make_plan(past.dir, step=3)
