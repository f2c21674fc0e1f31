"""The split of a batch into minibatches."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r2vpo.algorithm.minibatches import split_minibatches


@given(data=st.data(), num_groups=st.integers(1, 24), seed=st.integers(0, 2**32), step=st.integers(0, 10**6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_group_is_dealt_once_and_both_kinds_are_spread_evenly(
    make_batch, make_trajectory, data, num_groups, seed, step
):
    minibatches = data.draw(st.integers(1, num_groups))
    stale = data.draw(st.sets(st.integers(0, num_groups - 1)))
    batch = make_batch([[make_trajectory([1])]] * num_groups, step=step, stale=stale)
    parts = split_minibatches(batch, minibatches=minibatches, seed=seed)
    assert len(parts) == minibatches
    assert sorted(i for part in parts for i in part) == list(range(num_groups))
    for sizes in (
        [len(part) for part in parts],
        [len(stale.intersection(part)) for part in parts],
        [len(set(part) - stale) for part in parts],
    ):
        assert max(sizes) - min(sizes) <= 1
    assert all(parts)


def test_the_split_depends_on_seed_and_step_alone(make_batch, make_trajectory):
    groups = [[make_trajectory([1])]] * 16

    def split(step, seed):
        return split_minibatches(make_batch(groups, step=step, stale=range(8, 16)), minibatches=4, seed=seed)

    assert split(3, 7) == split(3, 7)
    assert split(3, 7) != split(4, 7)
    assert split(3, 7) != split(3, 8)


def test_which_groups_share_a_minibatch_changes_from_step_to_step(make_batch, make_trajectory):
    groups = [[make_trajectory([1])]] * 8
    splits = [split_minibatches(make_batch(groups, step=step), minibatches=2, seed=0) for step in range(20)]
    assert len({frozenset(map(frozenset, parts)) for parts in splits}) >= 10  # of 35 possible


def test_a_lone_stale_group_is_not_always_trained_first(make_batch, make_trajectory):
    places = Counter()
    for step in range(200):
        batch = make_batch([[make_trajectory([1])]] * 9, step=step, stale={8})
        places[[8 in part for part in split_minibatches(batch, minibatches=4, seed=0)].index(True)] += 1
    assert min(places[m] for m in range(4)) >= 30  # 50 expected of each


def test_fewer_groups_than_minibatches_is_refused_with_both_numbers(make_batch, make_trajectory):
    batch = make_batch([[make_trajectory([1])]] * 3, step=5)
    with pytest.raises(ValueError, match=r"step 5 has 3 groups.*learner\.minibatches=4"):
        split_minibatches(batch, minibatches=4, seed=0)
