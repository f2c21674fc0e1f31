from pathlib import Path

import pytest

from r2vpo.job import history
from r2vpo.job.config import load_config
from r2vpo.job.history import Start, code_digest, read_starts, start_of_step
from r2vpo.job.settings import ConfigError
from tests.job.past_run import PastRun


@pytest.fixture
def past(recipe, runs):
    return PastRun(recipe, runs)


def test_every_start_keeps_its_settings_and_its_first_step(past, recipe):
    past.add_checkpoint(4)
    past.start("learner.lr=3e-5", resume=True)
    first, second = read_starts(past.dir)
    assert (first.step, second.step) == (0, 4)
    assert first.config() == load_config(recipe)
    assert second.config() == load_config(recipe, ["learner.lr=3e-5"])


def test_a_resume_without_a_checkpoint_starts_at_step_0(past):
    past.start(resume=True)
    assert [start.step for start in read_starts(past.dir)] == [0, 0]


def test_a_run_without_history_has_no_starts(past):
    (past.dir.path / history.NAME).unlink()
    assert read_starts(past.dir) == []


def at(step: int, settings: str = "") -> Start:
    return Start(step=step, started_s=0.0, settings=settings, environment={"r2vpo": "0.0.1"})


def test_a_step_belongs_to_the_newest_start_that_began_at_it_or_before():
    first, resumed, resumed_from_further_back = starts = [at(0), at(8), at(4)]
    assert start_of_step(starts[:2], 7) is first
    assert start_of_step(starts[:2], 8) is resumed
    assert start_of_step(starts, 9) is resumed_from_further_back
    assert start_of_step(starts, 3) is first
    assert start_of_step([resumed], 7) is None


def test_settings_that_this_version_does_not_know_are_named_with_the_version_that_did():
    with pytest.raises(ConfigError, match=r"history\.jsonl:1: learner\.lrr is not a setting.*made the run \(0\.0\.1\)"):
        at(4, "{model: {path: m}, learner: {lrr: 1}}").config()


def test_the_environment_names_what_numbers_depend_on():
    assert {"python", "torch", "deepspeed", "transformers", "learner code", "cpu"} <= history.environment().keys()


def test_the_digest_of_the_code_changes_with_any_of_its_files(tmp_path: Path):
    for folder in history.CODE:
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.py").write_text("x = 1\n")
    before = code_digest(tmp_path)
    assert code_digest(tmp_path) == before
    (tmp_path / history.CODE[1] / "a.py").write_text("x = 2\n")
    assert code_digest(tmp_path) != before
