"""Group-relative advantages."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from r2vpo.algorithm.advantages import batch_advantages
from r2vpo.algorithm.config import ADVANTAGES

NAN = np.nan


def group_advantages(rewards_G, *, mode):
    [advantage_G] = batch_advantages([rewards_G], mode=mode)
    return advantage_G


def test_the_deviation_is_that_of_the_population():
    # mean 1/4, population variance 3/16: (3/4)/sqrt(3/16) = sqrt(3), (-1/4)/sqrt(3/16) = -1/sqrt(3)
    advantages = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), mode="mean_std")
    np.testing.assert_allclose(advantages, [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)])


def test_mean_only_centres():
    advantages = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]), mode="mean")
    np.testing.assert_allclose(advantages, [0.75, -0.25, -0.25, -0.25])


def test_leave_one_out_compares_with_the_mean_of_the_others():
    # 1 - 0; 0 - 1/3, three times; a member without verdict is no one's other
    advantages = group_advantages(np.array([1.0, 0.0, NAN, 0.0, 0.0]), mode="leave_one_out")
    np.testing.assert_allclose(advantages, [1.0, -1 / 3, 0.0, -1 / 3, -1 / 3])


def test_whitening_divides_by_the_deviation_over_the_batch():
    rewards = [np.array([3.0, 1.0]), np.array([NAN, 0.0, 0.0]), np.array([0.0, 2.0, 7.0]), np.array([5.0, NAN])]
    # centred ±1; 0, 0; -3, -1, 4; 0: squares 2 + 26 over 8 verdicts, D = sqrt(3.5)
    advantages = batch_advantages(rewards, mode="batch_whitened")
    expected = [[1.0, -1.0], [0.0, 0.0, 0.0], [-3.0, -1.0, 4.0], [0.0, 0.0]]
    for a_G, e_G in zip(advantages, expected, strict=True):
        np.testing.assert_allclose(a_G, np.array(e_G) / 3.5**0.5)


@pytest.mark.parametrize("mode", ["mean", "mean_std", "leave_one_out"])
def test_a_group_does_not_depend_on_the_others(mode):
    groups = [np.array([3.0, 1.0, NAN]), np.array([0.0, 0.5, 0.1, 0.2])]
    together = batch_advantages(groups, mode=mode)
    for a_G, r_G in zip(together, groups, strict=True):
        np.testing.assert_array_equal(a_G, group_advantages(r_G, mode=mode))


def test_an_empty_batch_has_no_advantages():
    assert batch_advantages([], mode="batch_whitened") == []


@pytest.mark.parametrize("mode", ADVANTAGES)
def test_a_member_without_verdict_gets_zero_and_does_not_move_the_baseline(mode):
    without = group_advantages(np.array([3.0, 1.0, 1.0]), mode=mode)
    among = group_advantages(np.array([NAN, 3.0, 1.0, NAN, 1.0]), mode=mode)
    np.testing.assert_array_equal(among, [0.0, without[0], without[1], 0.0, without[2]])


@pytest.mark.parametrize("mode", ADVANTAGES)
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


@given(st.lists(st.lists(st.integers(-50, 50), min_size=2, max_size=6), min_size=1, max_size=5))
def test_a_whitened_batch_has_mean_0_in_every_group_and_mean_square_1(rewards):
    assume(any(len(set(r)) > 1 for r in rewards))
    advantages = batch_advantages([np.array(r, dtype=np.float64) for r in rewards], mode="batch_whitened")
    assert all(a_G.sum() == pytest.approx(0.0, abs=1e-9) for a_G in advantages)
    assert (np.concatenate(advantages) ** 2).mean() == pytest.approx(1.0)


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
