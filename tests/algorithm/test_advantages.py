"""Group-relative advantages."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from r2vpo.algorithm.advantages import group_advantages

NAN = np.nan


def test_the_deviation_is_that_of_the_population():
    # mean 1/4, population variance 3/16: (3/4)/sqrt(3/16) = sqrt(3), (-1/4)/sqrt(3/16) = -1/sqrt(3)
    advantages = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), mode="mean_std")
    np.testing.assert_allclose(advantages, [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])


def test_mean_only_centres():
    advantages = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), mode="mean")
    np.testing.assert_allclose(advantages, [0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("mode", ["mean", "mean_std"])
def test_a_member_without_verdict_gets_zero_and_does_not_move_the_baseline(mode):
    without = group_advantages(np.array([3.0, 1.0, 1.0]), mode=mode)
    among = group_advantages(np.array([NAN, 3.0, 1.0, NAN, 1.0]), mode=mode)
    np.testing.assert_array_equal(among, [0.0, without[0], without[1], 0.0, without[2]])


@pytest.mark.parametrize("mode", ["mean", "mean_std"])
@pytest.mark.parametrize(
    "rewards",
    [[], [5.0], [NAN, NAN], [NAN, 2.0, NAN], [1.0, 1.0], [0.1, 0.1, 0.1], [0.1 + 0.2, 0.3], [0.0, 0.0, NAN]],
)
def test_where_nothing_can_be_compared_all_are_zero(rewards, mode):
    advantages = group_advantages(np.array(rewards, dtype=np.float64), mode=mode)
    np.testing.assert_array_equal(advantages, np.zeros(len(rewards)))


def test_small_but_real_differences_count():
    np.testing.assert_allclose(group_advantages(np.array([1.0, 1.0001]), mode="mean_std"), [-1.0, 1.0])


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="median"):
        group_advantages(np.array([1.0, 0.0]), mode="median")


@given(
    st.lists(st.integers(-100, 100), min_size=2, max_size=16),
    st.integers(-1000, 1000),
    st.integers(1, 1000),
)
def test_normalised_advantages_ignore_the_scale_and_offset_of_rewards(rewards, offset, scale):
    assume(len(set(rewards)) > 1)
    rewards_G = np.array(rewards, dtype=np.float64)
    advantages = group_advantages(rewards_G, mode="mean_std")
    np.testing.assert_allclose(group_advantages(scale * rewards_G + offset, mode="mean_std"), advantages, atol=1e-6)
    assert advantages.mean() == pytest.approx(0.0, abs=1e-9)
    assert (advantages**2).mean() == pytest.approx(1.0)
