import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.tree import ALIGNMENT, SumTree


def tree_of(weights, *, shift=0, size=None):
    tree = SumTree(size or shift + len(weights))
    tree.set(np.arange(len(weights)) + shift, np.array(weights, dtype=np.float64))
    return tree


def test_a_mass_falls_on_the_first_position_whose_weights_so_far_exceed_it():
    tree = tree_of([2.0, 0.0, 1.0, 3.0])
    assert tree.total == 6
    masses = np.array([0.0, 1.9, 2.0, 2.9, 3.0, 5.9])
    assert tree.find(masses).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_mass_at_the_very_end_falls_on_a_position_with_a_weight():
    tree = tree_of([0.1, 0.2, 0.3, 0.0])
    assert tree.find(np.array([np.nextafter(tree.total, 0), tree.total])).tolist() == [2, 2]


def test_ones_are_found_by_their_rank_across_blocks_and_roots():
    positions = np.array([0, 127, 128, ALIGNMENT - 1, ALIGNMENT, 3 * ALIGNMENT + 5])
    tree = SumTree(4 * ALIGNMENT)
    tree.set(positions, 1.0)
    assert tree.total == 6
    assert tree.find(np.arange(6.0)).tolist() == positions.tolist()


def test_a_weight_that_is_set_again_replaces_the_former_one():
    tree = tree_of([1.0, 1.0, 1.0])
    tree.set(np.array([1]), np.array([5.0]))
    assert (tree.total, tree.get(np.array([0, 1])).tolist()) == (7.0, [1.0, 5.0])
    tree.set(np.array([1]), 0.0)
    assert tree.find(np.array([0.5, 1.5])).tolist() == [0, 2]


def test_nothing_is_found_in_an_empty_tree():
    assert SumTree(0).total == 0
    with pytest.raises(AssertionError, match="nothing to find"):
        SumTree(9).find(np.array([0.0]))


def test_its_weights_cannot_be_written_past_it():
    with pytest.raises(ValueError, match="read-only"):
        tree_of([1.0]).weights()[0] = 2.0


weights = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=300)


@settings(deadline=None)
@given(weights, st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=8), st.randoms())
def test_sums_do_not_depend_on_the_order_of_changes_nor_on_where_the_range_begins(values, shares, random):
    plain = tree_of(values)
    shifted = SumTree(5 * ALIGNMENT)
    order = list(range(len(values)))
    random.shuffle(order)
    for i in order:
        shifted.set(np.array([i + 2 * ALIGNMENT]), 1e9)
        shifted.set(np.array([i + 2 * ALIGNMENT]), values[i])
    assert shifted.total == plain.total
    if plain.total > 0:
        masses = np.array(shares) * plain.total
        found = plain.find(masses)
        assert (plain.get(found) > 0).all()
        assert (shifted.find(masses) - 2 * ALIGNMENT).tolist() == found.tolist()
