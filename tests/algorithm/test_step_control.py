"""Warm-up and the control of the step size."""

import json
from math import exp, inf, nan

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
    # V̄ = (0.03 + 0.05)/2 = 0.04 = 2δ: s = sqrt(1/2)
    assert control.update([100.0, 0.03, 0.05]) == pytest.approx(0.5**0.5)


def test_one_update_moves_the_scale_by_a_factor_of_at_most_root_e():
    assert StepControl(DELTA).update([0.0, 1e9]) == pytest.approx(exp(-0.5))
    assert StepControl(DELTA).update([0.0, 1e-9]) == pytest.approx(exp(0.5))


@pytest.mark.parametrize(
    "second_moments",
    [[], [0.5], [0.5, 0.0], [0.0, 0.0, 0.0], [0.5, nan], [0.5, inf], [0.5, -inf, nan, 0.0]],
)
def test_what_says_nothing_about_the_step_leaves_the_scale_unchanged(second_moments):
    control = StepControl(DELTA)
    control.update([0.0, 0.04])
    before = control.scale
    assert control.update(second_moments) == before


def test_broken_entries_are_dropped_and_zeros_are_not():
    # V̄ = (0.08 + 0)/2 = 2δ
    assert StepControl(DELTA).update([0.0, nan, 0.08, inf, 0.0]) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("nominal", "updates"),
    # With V = δ·(nominal·s)² one update takes clip(log(V/δ), ±1) off log(V/δ).
    # 10 × too low: log(1/100) = -4.61, five updates; 4 × too high: log 16 = 2.77, three.
    [(0.1, 5), (4.0, 3)],
)
def test_a_wrong_learning_rate_is_corrected_in_a_few_learner_steps(nominal, updates):
    control = StepControl(DELTA)

    def second_moment():
        return DELTA * (nominal * control.scale) ** 2

    for _ in range(updates - 1):
        control.update([0.0, second_moment()])
    assert second_moment() != pytest.approx(DELTA, rel=0.1)
    control.update([0.0, second_moment()])
    assert second_moment() == pytest.approx(DELTA, rel=1e-9)
    assert control.scale == pytest.approx(1 / nominal)
    control.update([0.0, second_moment()])
    assert second_moment() == pytest.approx(DELTA, rel=1e-9)


@given(st.lists(st.lists(st.floats(min_value=0) | st.just(nan), max_size=5), max_size=30))
@example([[0.0, 1e308, 1e308], [0.0, 5e-324]])
def test_the_scale_never_leaves_its_bounds(learner_steps):
    control = StepControl(DELTA)
    for second_moments in learner_steps:
        assert 1 / 50 <= control.update(second_moments) <= 50


def test_the_bounds_are_a_fiftieth_and_fifty():
    control = StepControl(DELTA)
    for _ in range(10):
        control.update([0.0, 1e-12])
    assert control.scale == 50.0
    for _ in range(20):
        control.update([0.0, 1e12])
    assert control.scale == 1 / 50


def test_a_restored_control_continues_exactly():
    control, restored = StepControl(DELTA), StepControl(DELTA)
    control.update([0.0, 0.0123])
    restored.load_state_dict(json.loads(json.dumps(control.state_dict())))
    assert restored.scale == control.scale
    assert restored.update([0.0, 0.03]) == control.update([0.0, 0.03])


def test_step_control_is_on_for_r2vpo_and_off_for_the_baselines_unless_asked():
    assert isinstance(make_step_control(AlgorithmConfig()), StepControl)
    assert isinstance(make_step_control(AlgorithmConfig(name="grpo", step_control=True)), StepControl)
    assert isinstance(make_step_control(AlgorithmConfig(name="grpo")), FixedStep)
    assert isinstance(make_step_control(AlgorithmConfig(step_control=False)), FixedStep)


def test_a_fixed_step_ignores_the_second_moment():
    fixed = FixedStep()
    assert fixed.update([0.0, 1e9]) == 1.0
    fixed.load_state_dict(fixed.state_dict())
    assert fixed.scale == 1.0


def test_the_state_of_the_other_actuator_is_refused():
    with pytest.raises(ValueError, match=r"algorithm\.step_control"):
        StepControl(DELTA).load_state_dict(FixedStep().state_dict())
    with pytest.raises(ValueError, match=r"algorithm\.step_control"):
        FixedStep().load_state_dict(StepControl(DELTA).state_dict())
