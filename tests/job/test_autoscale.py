"""When the run adds or drains a worker, from numbers of steps that are made up."""

import pytest

from r2vpo.job.autoscale import WINDOW_STEPS, Autoscaler
from rollout.config import AutoscaleConfig, RolloutConfig


def looks(autoscaler, count, *, wait_s=0.0, idle=0.0, target=2, serving=2):
    """What it says to ``count`` steps of a second each."""
    metrics = {"time/step_s": 1.0, "time/wait_s": wait_s, "rollout/idle_fraction": idle}
    return [autoscaler.look(metrics, target=target, serving=serving) for _ in range(count)]


@pytest.fixture
def autoscaler():
    return Autoscaler(AutoscaleConfig(min=1, max=3))


def test_a_learner_that_waits_gets_one_worker_more_after_a_whole_window(autoscaler):
    *before, last = looks(autoscaler, WINDOW_STEPS, wait_s=0.25, idle=0.0)
    assert before == [None] * (WINDOW_STEPS - 1)
    assert last.workers == 3
    assert last.reason == (
        "over 20 steps the learner waited 25% of its time, the workers 0% of theirs: one worker more, 3 of at most 3"
    )


def test_workers_that_wait_lose_one_of_them_only_if_the_learner_hardly_waits(autoscaler):
    assert looks(autoscaler, WINDOW_STEPS, wait_s=0.1, idle=0.9)[-1] is None
    assert looks(autoscaler, WINDOW_STEPS, wait_s=0.01, idle=0.9)[-1].workers == 1
    assert looks(autoscaler, WINDOW_STEPS, wait_s=0.01, idle=0.4)[-1] is None


def test_the_bounds_are_kept(autoscaler):
    assert looks(autoscaler, WINDOW_STEPS, wait_s=0.9, target=3, serving=3)[-1] is None
    assert looks(autoscaler, WINDOW_STEPS, idle=0.9, target=1, serving=1)[-1] is None


def test_while_a_worker_is_still_coming_nothing_is_measured(autoscaler):
    looks(autoscaler, WINDOW_STEPS - 1, wait_s=0.9)
    assert looks(autoscaler, 1, wait_s=0.9, serving=1) == [None]
    assert looks(autoscaler, WINDOW_STEPS - 1, wait_s=0.9)[-1] is None


def test_without_a_maximum_the_number_stays_as_it_is():
    assert looks(Autoscaler(AutoscaleConfig()), 3 * WINDOW_STEPS, wait_s=0.9) == [None] * (3 * WINDOW_STEPS)


def test_bounds_that_clash_are_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"autoscale\.max=2 is less than rollout\.autoscale\.min=3"):
        AutoscaleConfig(min=3, max=2)
    with pytest.raises(ValueError, match=r"rollout\.workers=5 lies outside rollout\.autoscale\.min=1 to max=4"):
        RolloutConfig(workers=5, autoscale=AutoscaleConfig(max=4))
