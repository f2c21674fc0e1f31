"""The multiplier λ."""

import json
from math import exp, inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.dual import BoundedDual, FixedDual, make_dual

DELTA = 0.02


def make():
    return make_dual(AlgorithmConfig(delta=DELTA))


def test_one_update_by_hand():
    dual = make()
    # Vs = 0.9·0.02 + 0.1·0.04 = 0.022; Vs/δ - 1 = 0.1; λ = 0.5·e^0.01
    assert dual.update(0.04) == pytest.approx(0.5 * exp(0.01))
    # Vs = 0.9·0.022 + 0.1·0 = 0.0198; Vs/δ - 1 = -0.01
    assert dual.update(0.0) == pytest.approx(0.5 * exp(0.01) * exp(-0.001))
    assert dual.lam == dual.update(nan)


def test_a_v_on_budget_leaves_lambda_alone():
    dual = make()
    for _ in range(100):
        dual.update(DELTA)
    assert dual.lam == pytest.approx(0.5, rel=1e-12)


def test_an_infeasible_budget_pins_lambda_at_its_ceiling_and_says_so():
    dual = make()
    assert not dual.saturated
    for _ in range(50):
        dual.update(10 * DELTA)
    assert dual.lam == 1.0
    assert dual.saturated
    for _ in range(50):
        dual.update(0.0)
    assert not dual.saturated


def test_an_unused_budget_lowers_lambda_to_its_floor():
    dual = make()
    for _ in range(50):
        dual.update(0.0)
    assert dual.lam == 0.25


def test_one_token_of_ratio_a_million_is_forgotten_in_14_updates():
    dual = make()
    # V = (1e6)²/1000 counts as 5δ: x = Vs/δ - 1 becomes 0.4, whatever its size
    assert dual.update(1e12 / 1000) == pytest.approx(0.5 * exp(0.04))
    # with V = δ/2 from here x ← 0.9·x - 0.05: x_k = -0.5 + 0.9·0.9^k, and λ is back once Σ x ≤ 0:
    # after 13 terms -6.5 + 9·(1 - 0.9^13) = 0.21, after 14 terms -7 + 9·(1 - 0.9^14) = -0.06
    lams = [dual.update(DELTA / 2) for _ in range(13)]
    assert lams[11] > 0.5
    assert lams[12] < 0.5


def test_even_without_relief_one_spike_moves_lambda_by_less_than_half():
    dual = make()
    dual.update(1e9)
    for _ in range(1000):
        dual.update(DELTA)
    assert dual.lam == pytest.approx(0.5 * exp(0.4))  # 0.1·0.4·Σ 0.9^k = 0.4


@pytest.mark.parametrize("broken", [nan, inf, -inf])
def test_a_v_that_is_not_finite_changes_nothing(broken):
    dual, untouched = make(), make()
    dual.update(0.03)
    untouched.update(0.03)
    assert dual.update(broken) == untouched.lam
    assert dual.state_dict() == untouched.state_dict()
    assert dual.update(0.03) == untouched.update(0.03)


@given(st.lists(st.floats(min_value=0) | st.just(nan), max_size=60))
def test_lambda_never_leaves_its_bounds(second_moments):
    dual = make()
    for v in second_moments:
        assert 0.25 <= dual.update(v) <= 1.0


def test_a_restored_dual_continues_exactly():
    dual, restored = make(), make()
    for v in (0.5, 0.001, 0.03):
        dual.update(v)
    restored.load_state_dict(json.loads(json.dumps(dual.state_dict())))
    assert restored.state_dict() == dual.state_dict()
    assert [restored.update(v) for v in (0.07, 0.0)] == [dual.update(v) for v in (0.07, 0.0)]


def test_a_fixed_lambda_stays():
    dual = make_dual(AlgorithmConfig(dual="fixed", lambda_init=0.7))
    assert isinstance(dual, FixedDual)
    assert [dual.update(v) for v in (0.0, 1e9, nan)] == [0.7, 0.7, 0.7]
    assert not dual.saturated
    dual.load_state_dict(dual.state_dict())
    assert dual.lam == 0.7


def test_the_state_of_another_dual_is_refused():
    bounded, fixed = make(), FixedDual(0.5)
    assert isinstance(bounded, BoundedDual)
    with pytest.raises(ValueError, match=r"algorithm\.dual"):
        bounded.load_state_dict(fixed.state_dict())
    with pytest.raises(ValueError, match=r"algorithm\.dual"):
        fixed.load_state_dict(bounded.state_dict())


@pytest.mark.parametrize("name", ["grpo", "grpo_decoupled"])
def test_an_objective_without_a_penalty_has_a_multiplier_of_zero(name):
    dual = make_dual(AlgorithmConfig(name=name))
    assert (dual.lam, dual.update(10.0), dual.saturated) == (0.0, 0.0, False)
