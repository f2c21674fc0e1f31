"""Warm-up and the control of the step size."""

import json
from math import inf, nan

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.step_control import FixedStep, StepControl, make_step_control, warmup_factor

DELTA = 0.02


def test_warm_up_is_linear_and_ends_at_1():
    assert [warmup_factor(k, 4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warmup_factor(0, n) for n in (0, 1)] == [1.0, 1.0]


def test_the_first_optimiser_step_is_left_out():
    control = StepControl(DELTA)
    # V̄ = (0.03 + 0.05)/2 = 2δ: Vs = 0.7·1 + 0.3·2 = 1.3, s = exp(-0.3·log 1.3)
    assert control.update([100.0, 0.03, 0.05], share=1.0) == pytest.approx(1.3**-0.3)
    assert control.smoothed == pytest.approx(1.3)


def test_a_batch_may_spend_a_share_of_the_budget():
    control = StepControl(DELTA)
    # V̄ = δ/2 is half of the budget: Vs stays 1, and so does s.
    assert control.update([0.0, DELTA / 2], share=0.5) == pytest.approx(1.0)
    # The same V̄ is 5 times a tenth of it: Vs = 0.7 + 0.3·5 = 2.2
    assert control.update([0.0, DELTA / 2], share=0.1) == pytest.approx(2.2**-0.3)


def test_a_spike_counts_as_five_budgets():
    # Vs = 0.7 + 0.3·5 = 2.2
    assert StepControl(DELTA).update([0.0, 1e9], share=1.0) == pytest.approx(2.2**-0.3)


def test_a_scale_that_has_not_settled_rises_twice_as_fast_as_it_falls():
    control = StepControl(DELTA)
    # Vs = 0.7 + 0.3·0.5 = 0.85, then 0.7·0.85 + 0.3·0.5 = 0.745: below 1 as in the beginning.
    control.update([0.0, DELTA / 2], share=1.0)
    assert control.update([0.0, DELTA / 2], share=1.0) == pytest.approx((0.85 * 0.745) ** -0.6)
    assert not control.settled


def test_once_settled_the_scale_rises_slowly_and_falls_as_before():
    control = StepControl(DELTA)
    control.update([0.0, 2 * DELTA], share=1.0)  # Vs = 1.3
    # Vs = 0.7·1.3 + 0.3·0.2 = 0.97: it has come down through 1.
    risen = control.update([0.0, DELTA / 5], share=1.0)
    assert control.settled
    assert risen == pytest.approx(1.3**-0.3 * 0.97**-0.1)
    # Vs = 0.7·0.97 + 0.3·3 = 1.579
    assert control.update([0.0, 3 * DELTA], share=1.0) == pytest.approx(risen * 1.579**-0.3)


@pytest.mark.parametrize(
    "second_moments",
    [[], [0.5], [0.5, 0.0], [0.0, 0.0, 0.0], [0.5, nan], [0.5, inf], [0.5, -inf, nan, 0.0]],
)
def test_what_says_nothing_about_the_step_leaves_the_control_unchanged(second_moments):
    control = StepControl(DELTA)
    control.update([0.0, 0.04], share=1.0)
    before = control.state_dict()
    control.update(second_moments, share=1.0)
    assert control.state_dict() == before


def test_a_batch_without_signal_leaves_the_control_unchanged():
    control = StepControl(DELTA)
    assert control.update([0.0, 1e-9], share=0.0) == 1.0
    assert control.smoothed == 1.0


def test_broken_entries_are_dropped_and_zeros_are_not():
    # V̄ = (0.08 + 0)/2 = 2δ
    assert StepControl(DELTA).update([0.0, nan, 0.08, inf, 0.0], share=1.0) == pytest.approx(1.3**-0.3)


@pytest.mark.parametrize("nominal", [0.1, 10.0])
def test_a_learning_rate_ten_times_off_is_corrected_in_a_dozen_learner_steps(nominal):
    control = StepControl(DELTA)

    def second_moment():
        return DELTA * (nominal * control.scale) ** 2

    for _ in range(12):
        control.update([0.0, second_moment()], share=1.0)
    assert DELTA / 5 < second_moment() < 2 * DELTA
    for _ in range(40):
        control.update([0.0, second_moment()], share=1.0)
    assert second_moment() == pytest.approx(DELTA, rel=1e-2)


@pytest.mark.parametrize("scatter", [0.3, 0.6])
def test_the_mean_of_a_noisy_second_moment_is_held_at_the_budget(scatter):
    rng, control, seen = np.random.default_rng(0), StepControl(DELTA), []
    for _ in range(3000):
        seen.append(DELTA * 4 * control.scale**2 * np.exp(scatter * rng.standard_normal()))
        control.update([0.0, seen[-1]], share=1.0)
    assert np.mean(seen[50:]) == pytest.approx(DELTA, rel=0.15)


@given(
    st.lists(st.lists(st.floats(min_value=0) | st.just(nan), max_size=5), max_size=30),
    st.just(0.0) | st.floats(1e-9, 1),  # a share is a count over a count
)
@example([[0.0, 1e308, 1e308], [0.0, 5e-324]], 1.0)
def test_the_scale_never_leaves_its_bounds(learner_steps, share):
    control = StepControl(DELTA)
    for second_moments in learner_steps:
        assert 1 / 50 <= control.update(second_moments, share=share) <= 50


def test_the_bounds_are_a_fiftieth_and_fifty():
    control = StepControl(DELTA)
    for _ in range(30):
        control.update([0.0, 1e-12], share=1.0)
    assert control.scale == 50.0
    for _ in range(60):
        control.update([0.0, 1e12], share=1.0)
    assert control.scale == 1 / 50


def test_a_restored_control_continues_exactly():
    control, restored = StepControl(DELTA), StepControl(DELTA)
    for second_moment in (0.03, 0.0123):
        control.update([0.0, second_moment], share=1.0)
    assert control.settled
    restored.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert restored.state_dict() == control.state_dict()
    assert restored.update([0.0, 0.003], share=1.0) == control.update([0.0, 0.003], share=1.0)


def test_step_control_is_on_for_r2vpo_and_off_for_the_baselines_unless_asked():
    assert isinstance(make_step_control(AlgorithmConfig()), StepControl)
    assert isinstance(make_step_control(AlgorithmConfig(name="grpo", step_control=True)), StepControl)
    assert isinstance(make_step_control(AlgorithmConfig(name="grpo")), FixedStep)
    assert isinstance(make_step_control(AlgorithmConfig(step_control=False)), FixedStep)


def test_a_fixed_step_ignores_the_second_moment():
    fixed = FixedStep()
    assert fixed.update([0.0, 1e9], share=1.0) == 1.0
    fixed.load_state_dict(fixed.state_dict())
    assert fixed.scale == 1.0


def test_the_state_of_the_other_actuator_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.step_control"):
        StepControl(DELTA).load_state_dict(FixedStep().state_dict())
    with pytest.raises(ValueError, match=r"algorithm\.step_control"):
        FixedStep().load_state_dict(StepControl(DELTA).state_dict())
