"""How often a component is started again, by a clock that is moved by hand."""

import pytest

from r2vpo.job.component import ComponentDied, ComponentSilent, FailedForGood, JobFailed
from r2vpo.job.config import SupervisorConfig
from r2vpo.job.errorlog import ErrorLog
from r2vpo.job.restarts import Restarts


class Clock:
    now_s = 0.0


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def notes():
    return []


@pytest.fixture
def restarts(tmp_path, clock, notes):
    config = SupervisorConfig(max_restarts=2, window_s=600.0, backoff_s=3.0)
    return Restarts(config, note=notes.append, errors=ErrorLog(tmp_path / "error.log"), clock=lambda: clock.now_s)


def begin(restarts, failure, component="rollout-0"):
    return restarts.begin(component, failure, role="rollout", remedy="replacing it")


def test_every_restart_within_the_window_waits_twice_as_long_and_is_told_with_its_number(restarts, notes):
    assert begin(restarts, ComponentDied("rollout-0 died: killed; see x")) == 3.0
    assert begin(restarts, ComponentSilent("rollout-0 has not answered for 5 s")) == 6.0
    assert notes == [
        "rollout-0 died; replacing it (1 of 2 within 10 min)",
        "rollout-0 has not answered for 5 s; replacing it (2 of 2 within 10 min)",
    ]
    assert restarts.totals == {"rollout": 2}


def test_one_failure_more_ends_the_run_with_the_last_error(restarts):
    for _ in range(2):
        begin(restarts, JobFailed("rollout-0 failed: x"))
    with pytest.raises(
        FailedForGood, match=r"^rollout-0 failed 3 times within 10 min, at last so: rollout-0 failed: y$"
    ):
        begin(restarts, JobFailed("rollout-0 failed: y"))


def test_a_restart_is_forgotten_after_the_window_and_others_count_for_themselves(restarts, clock):
    begin(restarts, JobFailed("x"))
    clock.now_s = 599.0
    begin(restarts, JobFailed("x"))
    assert restarts.count("rollout-0") == 2
    clock.now_s = 600.0
    assert restarts.count("rollout-0") == 1
    assert restarts.count("rollout-1") == 0
    assert begin(restarts, JobFailed("x")) == 6.0


def test_what_would_fail_again_is_not_started_again_and_goes_to_the_log(restarts, tmp_path, notes):
    failure = FailedForGood("rollout-0 failed: no such reward")
    with pytest.raises(FailedForGood) as caught:
        begin(restarts, failure)
    assert caught.value is failure
    assert notes == []
    assert "no such reward" in (tmp_path / "error.log").read_text()


def test_a_restart_of_all_processes_is_one_of_the_run_and_those_of_its_parts_are_forgotten(restarts, notes):
    lost = ComponentDied("weight board died: killed")
    for _ in range(2):
        begin(restarts, lost)
        begin(restarts, lost)
        restarts.begin_all(lost, remedy="starting all again")
        assert restarts.count("rollout-0") == 0
    assert notes[2] == "weight board died; starting all again (1 of 2 within 10 min)"
    assert restarts.totals == {"rollout": 4, "job": 2}
    with pytest.raises(FailedForGood, match=r"^run failed 3 times within 10 min"):
        restarts.begin_all(lost, remedy="starting all again")
