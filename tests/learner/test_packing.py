import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.packing import balanced_bins, deal_to_ranks, level

SIZES = st.lists(st.integers(1, 50), max_size=40)


def test_the_largest_goes_first_and_each_to_the_emptiest_bin():
    # 14 tokens need two bins of 8: 5 | 3, then 3 joins 3 (6), 2 joins 5 (7), 1 joins 6 (7).
    assert balanced_bins([5, 3, 3, 2, 1], multiple=1, capacity=8) == [[0, 3], [1, 2, 4]]


def test_an_item_above_the_capacity_gets_a_bin_of_its_own():
    assert balanced_bins([20, 4, 4], multiple=1, capacity=8) == [[0], [1, 2]]


def test_no_item_at_all_gives_empty_bins():
    assert balanced_bins([], multiple=2, capacity=8) == [[], []]


@given(SIZES, st.integers(1, 4), st.integers(1, 60))
def test_every_item_lies_in_one_bin_and_no_bin_of_several_overflows(sizes, multiple, capacity):
    bins = balanced_bins(sizes, multiple=multiple, capacity=capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    assert all(len(members) <= 1 or sum(sizes[i] for i in members) <= capacity for members in bins)
    assert len(bins) % multiple == 0


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 4))
def test_loads_differ_by_at_most_the_largest_item(sizes, multiple):
    loads = [sum(sizes[i] for i in members) for members in balanced_bins(sizes, multiple=multiple, capacity=100)]
    assert max(loads) - min(loads) <= max(sizes)


@given(SIZES, st.integers(1, 4), st.integers(1, 60))
def test_every_rank_gets_equally_many_micro_batches(sizes, ranks, capacity):
    per_rank = deal_to_ranks(sizes, ranks=ranks, capacity=capacity)
    assert len({len(bins) for bins in per_rank}) == 1
    assert sorted(i for bins in per_rank for members in bins for i in members) == list(range(len(sizes)))


def test_ranks_get_micro_batches_of_alike_size_at_the_same_time():
    per_rank = deal_to_ranks([8, 7, 2, 1], ranks=2, capacity=8)
    assert per_rank == [[[0], [2]], [[1], [3]]]  # 18 tokens need three bins of 8, so two per rank


def test_missing_micro_batches_are_filled_up_with_empty_ones():
    assert level([[[0], [1]], [[2]], []]) == [[[0], [1]], [[2], []], [[], []]]


@pytest.mark.parametrize("count", [2000])
def test_many_trajectories_just_above_half_a_micro_batch_are_dealt_without_a_long_search(count, monkeypatch):
    from learner import packing

    rounds = []
    deal = packing._deal
    monkeypatch.setattr(packing, "_deal", lambda sizes, n: rounds.append(n) or deal(sizes, n))
    assert len(balanced_bins([51] * count, multiple=1, capacity=100)) == count
    assert len(rounds) == 1
