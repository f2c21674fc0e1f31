from pathlib import Path

import pytest

from r2vpo.job.config import ModelConfig, RunConfig, load_config
from r2vpo.job.resume import ASKED, FIXED, FREE, OnResume, changes_text, check_changes, check_resumable, on_resume
from r2vpo.job.settings import ConfigError, leaves
from tests.job.past_run import PastRun

SETTINGS = [key for key, _ in leaves(RunConfig(model=ModelConfig(path="m")))]


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_is_in_exactly_one_class(key):
    assert on_resume(key) in OnResume


def test_no_class_names_a_setting_that_is_none():
    assert sorted([*FIXED, *ASKED, *FREE]) == sorted(SETTINGS)


@pytest.fixture
def past(recipe: Path, runs: Path) -> PastRun:
    return PastRun(recipe, runs)


def changed(past: PastRun, *overrides: str) -> RunConfig:
    return load_config(past.recipe, overrides)


def refusal(past: PastRun, *overrides: str, allowed: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        check_resumable(past.dir, changed(past, *overrides), allowed=allowed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_how_fast_how_long_and_where_a_run_works_may_change_at_will(past):
    config = changed(past, "learner.steps=500", "rollout.workers=3", "learner.keep_every=10", "tracking.wandb=offline")
    assert check_resumable(past.dir, config) == {}


def test_all_changes_that_are_refused_are_named_at_once_with_the_flags_to_add(past):
    assert refusal(past, "algorithm.step_control=false", "learner.lr=1e-3", "learner.steps=500") == (
        "--resume: algorithm.step_control=false (was null), learner.lr=0.001 (was 1e-06) would change what run toy "
        "means: keep the old values, or add --allow-change algorithm.step_control --allow-change learner.lr"
    )
    assert refusal(past, "algorithm.step_control=false", "learner.lr=1e-3", allowed=("learner.lr",)).endswith(
        "means: keep the old value, or add --allow-change algorithm.step_control"
    )


def test_what_the_store_depends_on_cannot_be_allowed(past):
    message = refusal(past, "seed=1", "replay.shards=2", "learner.lr=1e-3")
    assert message.startswith("--resume: seed=1 (was 0), but the order of prompts")
    assert "; replay.shards=2 (was 1), but the groups lie in as many files" in message
    assert "keep the old value, or start another run with name=…; and learner.lr=0.001 (was 1e-06) would" in message
    assert refusal(past, "seed=1", allowed=("seed",)) == (
        "--allow-change seed: seed cannot change in a run, since the order of prompts and the split into minibatches "
        "follow from it"
    )
    assert "learner.lrr is not a setting" in refusal(past, allowed=("learner.lrr",))


def test_allowed_changes_are_returned_and_what_is_allowed_and_the_same_is_none(past):
    allowed = ("learner.lr", "algorithm.delta", "learner.steps")
    changes = check_resumable(past.dir, changed(past, "learner.lr=1e-3", "learner.steps=500"), allowed=allowed)
    assert changes == {"learner.lr": (1e-6, 1e-3)}
    assert changes_text(changes) == "learner.lr=0.001 (was 1e-06)"


def test_settings_are_compared_with_the_last_start_whatever_config_yaml_says_by_now(past):
    edited = past.dir.config.read_text().replace("seed: 0", "seed: 5")
    past.dir.config.write_text(edited)
    with pytest.raises(ConfigError, match=r"seed=5 \(was 0\)"):
        check_resumable(past.dir, load_config(past.dir.config))


def test_a_history_that_cannot_be_read_is_named(past):
    history = past.dir.path / "history.jsonl"
    history.write_text(history.read_text() + "{}\n")
    assert "history.jsonl is damaged" in refusal(past)


def test_long_values_are_shown_on_one_line():
    old, new = (RunConfig(name="r", model=ModelConfig(path="m", trust_remote_code=trust)) for trust in (False, True))
    with pytest.raises(ConfigError, match=r"model\.trust_remote_code=true \(was false\)"):
        check_changes(old, new, allowed=())
