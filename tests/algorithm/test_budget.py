"""One budget, three actuators: what a learner step tells them, and when it ends."""

import json
from math import exp, inf, nan

import pytest

from r2vpo.algorithm.budget import Budget, GroupSignal, budget_share
from r2vpo.algorithm.config import AlgorithmConfig

DELTA = 0.01


def budget(**settings) -> Budget:
    return Budget(AlgorithmConfig(delta=DELTA, **settings))


def group(reward, *, signal=False, fresh=True):
    return GroupSignal(is_fresh=fresh, has_signal=signal, reward=reward)


def test_more_groups_with_a_signal_may_spend_more_of_the_budget():
    mixed = group(0.5, signal=True)
    # n / (n + 32), none solved: half of δ at 32 groups.
    assert budget_share([mixed] * 32) == 1 / 2
    assert budget_share([mixed] * 96) == 3 / 4
    # Stale groups tell the gradient from its noise like fresh ones.
    assert budget_share([mixed] * 32 + [group(0.5, signal=True, fresh=False)] * 64) == 3 / 4


def test_groups_whose_answers_are_all_wrong_have_no_signal_and_nothing_to_lose():
    # 8 of 40 have a signal, and none of the others is solved.
    assert budget_share([group(0.0)] * 32 + [group(0.125, signal=True)] * 8) == 8 / 40


def test_groups_whose_answers_are_all_right_have_no_signal_and_are_solved():
    # n = 1; (1 + 1)/(1 + 3) are unsolved.
    assert budget_share([group(1.0), group(1.0), group(0.5, signal=True)]) == 1 / 33 * (2 / 4) ** 2
    # One right and one wrong throughout: (1 + 2)/(1 + 3).
    assert budget_share([group(0.0), group(1.0), group(0.5, signal=True)]) == 1 / 33 * (3 / 4) ** 2


def test_stale_groups_are_neither_solved_nor_unsolved():
    stale = [group(0.5, signal=True, fresh=False)] * 32
    # All fresh ones are above the mean, and solved: 1/4. All below it: 1.
    assert budget_share([group(1.0)] * 3 + stale) == 1 / 2 * (1 / 4) ** 2
    assert budget_share([group(0.0)] * 3 + stale) == 1 / 2
    assert budget_share(stale) == 1 / 2


def test_a_batch_without_any_signal_has_no_budget():
    assert budget_share([group(1.0), group(0.0), group(0.0, fresh=False)]) == 0.0
    assert budget_share([]) == 0.0


def test_the_first_optimiser_step_moves_nothing_whatever_it_measured():
    b = budget()
    b.begin(share=1.0)
    assert b.observe(1e6)
    b.end()
    assert (b.lam, b.scale) == (1.0, 1.0)


def test_lambda_rises_with_the_second_moment_of_later_steps():
    b = budget()
    b.begin(share=1.0)
    b.observe(0.0)
    b.observe(2 * DELTA)
    # Vs = 0.9·δ + 0.1·2δ = 1.1·δ: λ = exp(0.1·0.1)
    assert b.lam == pytest.approx(exp(0.01))


def test_all_actuators_compare_with_the_share_that_the_batch_may_spend():
    b = budget()
    b.begin(share=0.25)
    b.observe(0.0)
    # δ/4 is exactly the budget of this batch.
    assert b.observe(DELTA / 4)
    assert b.lam == pytest.approx(1.0)
    assert not b.observe(2.01 * DELTA / 4)
    b.end()
    # V̄ = (1 + 2.01)/2 budgets: Vs = 0.7 + 0.3·1.505
    assert b.scale == pytest.approx((0.7 + 0.3 * 1.505) ** -0.3)


@pytest.mark.parametrize(("second_moment", "goes_on"), [(2 * DELTA, True), (2.001 * DELTA, False), (inf, True)])
def test_a_learner_step_ends_above_twice_its_budget(second_moment, goes_on):
    b = budget()
    b.begin(share=1.0)
    b.observe(0.0)
    assert b.observe(second_moment) is goes_on


def test_a_batch_without_signal_has_no_budget_to_exceed_and_moves_no_actuator():
    b = budget()
    b.begin(share=0.0)
    assert b.observe(0.0)
    assert b.observe(10.0)
    b.end()
    assert (b.lam, b.scale) == (1.0, 1.0)


@pytest.mark.parametrize(
    "settings", [{"end_early": False}, {"step_control": False}, {"name": "grpo"}, {"name": "plain_is"}]
)
def test_ending_early_goes_with_step_control_unless_asked_otherwise(settings):
    b = budget(**settings)
    b.begin(share=1.0)
    b.observe(0.0)
    assert b.observe(1e9)


def test_a_rival_may_have_it_too():
    b = budget(name="grpo", step_control=True)
    b.begin(share=1.0)
    b.observe(0.0)
    assert not b.observe(1.0)
    assert b.lam == 0.0


def test_a_restored_budget_continues_exactly():
    b, restored = budget(), budget()
    for step in range(3):
        b.begin(share=0.5)
        for v in (0.0, 0.002 * step, 0.004, nan):
            b.observe(v)
        b.end()
    restored.load_state_dict(json.loads(json.dumps(b.state_dict())))
    assert restored.state_dict() == b.state_dict()
    for x in (b, restored):
        x.begin(share=1.0)
        x.observe(0.0)
        x.observe(0.013)
        x.end()
    assert (restored.lam, restored.scale) == (b.lam, b.scale)


def test_each_learner_step_begins_anew():
    b = budget()
    b.begin(share=1.0)
    b.observe(0.0)
    b.observe(100.0)
    b.end()
    scale = b.scale
    b.begin(share=1.0)
    assert b.observe(100.0)  # the first of this step
    b.end()
    assert b.scale == scale
