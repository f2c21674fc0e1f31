"""The multiplier λ."""

import json
from math import exp, inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from r2vpo.algorithm.config import OBJECTIVES, AlgorithmConfig
from r2vpo.algorithm.dual import AdditiveDual, BoundedDual, FixedDual, make_dual

DELTA = 0.02


def make():
    return make_dual(AlgorithmConfig(delta=DELTA))


def make_additive(rate=1.0):
    return make_dual(AlgorithmConfig(delta=DELTA, dual="additive", dual_rate=rate))


def test_one_update_by_hand():
    dual = make()
    # Vs = 0.9·0.02 + 0.1·0.04 = 0.022; Vs/δ - 1 = 0.1; λ = 1·e^0.01
    assert dual.update(0.04) == pytest.approx(exp(0.01))
    # Vs = 0.9·0.022 + 0.1·0 = 0.0198; Vs/δ - 1 = -0.01
    assert dual.update(0.0) == pytest.approx(exp(0.01) * exp(-0.001))
    assert dual.lam == dual.update(nan)


def test_a_v_on_budget_leaves_lambda_alone():
    dual = make()
    for _ in range(100):
        dual.update(DELTA)
    assert dual.lam == pytest.approx(1.0, rel=1e-12)


def test_an_infeasible_budget_pins_lambda_at_its_ceiling_and_says_so():
    dual = make()
    assert not dual.saturated
    for _ in range(50):
        dual.update(10 * DELTA)
    assert dual.lam == 1.5
    assert dual.saturated
    for _ in range(50):
        dual.update(0.0)
    assert not dual.saturated


def test_an_unused_budget_lowers_lambda_to_its_floor():
    dual = make()
    for _ in range(50):
        dual.update(0.0)
    assert dual.lam == 0.7


def test_one_token_of_ratio_a_million_is_forgotten_in_14_updates():
    dual = make()
    # V = (1e6)²/1000 counts as 5δ: x = Vs/δ - 1 becomes 0.4, whatever its size
    assert dual.update(1e12 / 1000) == pytest.approx(exp(0.04))
    # with V = δ/2 from here x ← 0.9·x - 0.05: x_k = -0.5 + 0.9·0.9^k, and λ is back once Σ x ≤ 0:
    # after 13 terms -6.5 + 9·(1 - 0.9^13) = 0.21, after 14 terms -7 + 9·(1 - 0.9^14) = -0.06
    lams = [dual.update(DELTA / 2) for _ in range(13)]
    assert lams[11] > 1.0
    assert lams[12] < 1.0


def test_even_without_relief_one_spike_moves_lambda_by_less_than_half():
    dual = make()
    dual.update(1e9)
    for _ in range(1000):
        dual.update(DELTA)
    assert dual.lam == pytest.approx(exp(0.4))  # 0.1·0.4·Σ 0.9^k = 0.4


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
        assert 0.7 <= dual.update(v) <= 1.5


@given(st.lists(st.floats(min_value=0) | st.just(nan), max_size=60), st.floats(1e-3, 10))
def test_an_additive_lambda_is_never_negative(second_moments, rate):
    dual = make_additive(rate)
    for v in second_moments:
        assert dual.update(v) >= 0.0


@given(
    st.lists(st.floats(0, 0.5), max_size=20),
    st.floats(1e-12, 1.0),
    st.lists(st.floats(0, 0.5), max_size=40),
)
def test_one_token_of_ratio_a_million_changes_lambda_by_a_bounded_factor_whatever_surrounds_it(before, share, after):
    with_it, without = make(), make()
    for v in before:
        with_it.update(v)
        without.update(v)
    with_it.update(share * 1e12)  # (10⁶)² times its share of the minibatch's tokens
    without.update(0.0)
    assert with_it.lam / without.lam <= exp(0.2)  # one update moves log λ by at most 0.1 either way
    for v in after:
        with_it.update(v)
        without.update(v)
    # Vs/δ differ by at most 0.5·0.9^k in the k-th update after, so log λ by at most 0.1·0.5·Σ 0.9^k = 0.5 in all
    assert 1.0 - 1e-12 <= with_it.lam / without.lam <= exp(0.5) * (1 + 1e-12)


@pytest.mark.parametrize(("start", "relief", "steps"), [(1.5, 0.0, 26), (0.7, 0.1, 7)])
def test_from_either_bound_lambda_is_back_at_its_start_in_a_stated_number_of_steps(start, relief, steps):
    dual = make()
    for _ in range(200):  # V = 10·δ drives Vs to its cap of 5·δ and λ to its ceiling, V = 0 both to their floors
        dual.update(10 * DELTA if start == 1.5 else 0.0)
    assert dual.lam == start
    lams = [dual.update(relief) for _ in range(steps)]
    # down: Vs/δ = 5·0.9^k exceeds 1 for 15 updates; then n more give Σ (Vs/δ - 1) = 9.27·(1 - 0.9^n) - n, which is
    # below 10·log(1/1.5) = -4.05 for n = 11 (-4.64) and not for 10 (-3.97)
    # up: Vs/δ = 5·(1 - 0.9^k) exceeds 1 from the third update; 0.355 + 0.7195 + 3·1 is above 10·log(1/0.7) = 3.57
    crossed = [lam <= 1.0 if start == 1.5 else lam >= 1.0 for lam in lams]
    assert crossed[-1]
    assert not crossed[-2]


def plant(dual, *, seed, steps=3000):
    """V of a learner whose updates λ brakes: 0.08/(1 + λ)² at the median, log-normal noise, and one in a hundred
    minibatches with a wild token, up to a thousand times as large.
    """
    rng, second_moments, lams = np.random.default_rng(seed), [], []
    for _ in range(steps):
        wild = 10 ** rng.uniform(1, 3) if rng.random() < 0.01 else 1.0
        v = 0.08 / (1 + dual.lam) ** 2 * np.exp(0.3 * rng.standard_normal()) * wild
        second_moments.append(v)
        lams.append(dual.update(v))
    return np.array(second_moments[500:]), np.array(lams[500:])


@pytest.mark.parametrize("seed", range(5))
def test_on_a_noisy_heavy_tailed_plant_v_is_held_near_delta(seed):
    second_moments, lams = plant(make(), seed=seed)
    assert np.minimum(second_moments, 5 * DELTA).mean() == pytest.approx(DELTA, rel=0.01)
    # the wild ones, 1 % that count as 5·δ, take 0.05·δ of the budget; the median of log-normal noise lies 4 % lower
    assert np.median(second_moments) == pytest.approx(0.92 * DELTA, rel=0.05)
    # of that median V = 0.08/(1 + λ)² says λ = 1.09
    assert np.median(lams) == pytest.approx(1.09, abs=0.05)
    assert np.mean(lams >= 1.5) < 0.03  # wild minibatches in a row lead to the ceiling, and back


def test_on_the_same_plant_the_additive_dual_winds_up():
    second_moments, lams = plant(make_additive(), seed=0)
    assert np.median(lams) > 1.5  # 1.09 would do
    assert np.median(second_moments) < DELTA / 3


def test_an_additive_update_by_hand():
    dual = make_additive(rate=2.0)
    assert isinstance(dual, AdditiveDual)
    assert dual.update(0.07) == pytest.approx(1.0 + 2 * 0.05)
    assert dual.update(nan) == pytest.approx(1.1)
    assert [dual.update(0.0) for _ in range(28)][-1] == 0.0  # 1.1 < 28·2·0.02
    assert dual.update(DELTA + 0.1) == pytest.approx(0.2)
    assert not dual.saturated


def test_one_wild_minibatch_keeps_an_additive_lambda_up_for_thousands_of_steps():
    dual = make_additive()
    assert dual.update(30.0) == pytest.approx(30.98)
    # with V = δ/2 from here it falls by 0.01 a step: 2,998 steps to 1
    lams = [dual.update(DELTA / 2) for _ in range(2999)]
    assert lams[2996] > 1.0 > lams[2998]


@pytest.mark.parametrize("make", [make, make_additive])
def test_a_restored_dual_continues_exactly(make):
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
    duals = (make(), make_additive(), FixedDual(0.5))
    assert isinstance(duals[0], BoundedDual)
    for dual in duals:
        for other in duals:
            if dual is not other:
                with pytest.raises(ValueError, match=r"algorithm\.dual"):
                    dual.load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if not n.startswith("r2vpo")])
@pytest.mark.parametrize("kind", ["bounded", "additive", "fixed"])
def test_an_objective_without_a_penalty_has_a_multiplier_of_zero(name, kind):
    dual = make_dual(AlgorithmConfig(name=name, dual=kind))
    assert (dual.lam, dual.update(10.0), dual.saturated) == (0.0, 0.0, False)
