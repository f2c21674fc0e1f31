import math

import pytest

from r2vpo.job import status
from r2vpo.job.config import ConfigError
from r2vpo.job.status import ComponentStatus, RunStatus, StoreStatus, Wait


def make_status(**changed):
    worker = ComponentStatus(
        name="rollout-0", role="rollout", state="serving", doing="generating", since_s=5.0, version=3, in_flight=4
    )
    store = StoreStatus(
        groups=9,
        fresh_waiting=2,
        in_flight=4,
        stale_eligible=7,
        held_groups=9,
        held_bytes=1000,
        unusable={"unscored": 1},
        troubles=("the disk is full",),
        waits=(Wait(who="learner", what="16 fresh groups", since_s=6.0),),
    )
    fields = {
        "run": "toy",
        "updated_s": 10.0,
        "pid": 7,
        "host": "here",
        "phase": "training",
        "phase_since_s": 1.0,
        "step": 3,
        "steps": 10,
        "version": 3,
        "target_workers": 1,
        "components": (worker,),
        "store": store,
        "rates": {"time/step_s": 0.5},
    }
    return RunStatus(**fields | changed)


@pytest.mark.parametrize("changed", [{}, {"components": ()}, {"store": None}, {"last_error": "x"}])
def test_a_status_reads_back_as_it_was_written(tmp_path, changed):
    wrote = make_status(**changed)
    status.write(tmp_path / "status.json", wrote)
    assert status.read(tmp_path / "status.json") == wrote


def test_numbers_that_json_does_not_have_are_unknown(tmp_path):
    status.write(tmp_path / "s", make_status(rates={"a": math.nan, "b": math.inf, "c": 1.5}))
    read = status.read(tmp_path / "s")
    assert read is not None
    assert read.rates == {"a": None, "b": None, "c": 1.5}


def test_a_run_that_never_said_anything_has_no_status(tmp_path):
    assert status.read(tmp_path / "status.json") is None


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"store": null, "components": [], "run": "toy"}', "\xff", "null"])
def test_a_file_that_says_something_else_is_refused_in_one_sentence(tmp_path, text):
    (tmp_path / "status.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"status\.json is not what this version of r2vpo writes"):
        status.read(tmp_path / "status.json")


def test_a_status_that_cannot_be_written_harms_nobody(tmp_path):
    status.write(tmp_path / "missing" / "status.json", make_status())
    assert list(tmp_path.iterdir()) == []


def test_the_store_s_own_counts_become_its_status():
    stats = {
        "groups": 9,
        "fresh_waiting": 2,
        "in_flight": 4,
        "stale_eligible": 7,
        "held_groups": 9,
        "held_bytes": 1000,
        "unusable": {"unscored": 1},
        "troubles": ["the disk is full"],
        "waits": [{"who": "learner", "what": "16 fresh groups", "since_s": 6.0}],
        "shards": [],
        "draining": False,
    }
    assert StoreStatus.from_stats(stats) == make_status().store


def test_a_word_that_is_no_role_or_state_is_a_mistake_of_the_program():
    fields = {"name": "x", "doing": "", "since_s": 0.0}
    with pytest.raises(AssertionError):
        ComponentStatus(role="cook", state="serving", **fields)
    with pytest.raises(AssertionError):
        ComponentStatus(role="rollout", state="asleep", **fields)
