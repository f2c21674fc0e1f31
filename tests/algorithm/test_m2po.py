"""The mask of M2PO."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from r2vpo.algorithm.m2po import m2po, m2po_mask
from tests.algorithm.token_batches import gain_gradient, make_tokens, values


def test_the_furthest_are_masked_until_the_mean_square_is_within_the_limit():
    log_ratio_N = values(0.1, 0.3, 0.5, -0.2)
    advantage_N = values(1.0, 1.0, 1.0, -1.0)
    # squares 0.01, 0.09, 0.25, 0.04: means of the smallest k are 0.01, 0.025, 0.0467, 0.0975
    assert m2po_mask(log_ratio_N, advantage_N, 0.098).tolist() == [True, True, True, True]
    assert m2po_mask(log_ratio_N, advantage_N, 0.05).tolist() == [True, True, False, True]
    assert m2po_mask(log_ratio_N, advantage_N, 0.04).tolist() == [True, False, False, True]
    assert m2po_mask(log_ratio_N, advantage_N, 0.005).tolist() == [False, False, False, False]


def test_tokens_that_move_against_their_advantage_are_neither_counted_nor_masked():
    log_ratio_N, advantage_N = values(-5.0, 5.0, 5.0, 0.1), values(1.0, -1.0, 0.0, 1.0)
    assert m2po_mask(log_ratio_N, advantage_N, 0.04).tolist() == [True, True, True, True]


def test_masked_tokens_count_in_the_denominator_and_have_no_gradient():
    tokens = make_tokens([1.1, 3.0], advantage=[1.0, 2.0])
    loss = m2po(tokens, 2, 0.0, limit=0.04)  # log² are 0.009 and 1.2: -(1.1)/2
    assert loss.item() == pytest.approx(-0.55)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.55, 0.0))


def test_a_mask_that_is_given_is_used():
    tokens = make_tokens([1.1, 3.0], keep=[False, True])
    assert m2po(tokens, 1, 0.0, limit=0.04).item() == pytest.approx(-3.0)


@given(st.lists(st.tuples(st.floats(-50, 50), st.sampled_from([-1.0, 0.0, 1.0])), max_size=30), st.floats(1e-3, 100))
def test_no_token_can_be_added_to_those_that_train_without_exceeding_the_limit(pairs, limit):
    log_ratio_N = torch.tensor([x for x, _ in pairs], dtype=torch.float64)
    advantage_N = torch.tensor([a for _, a in pairs], dtype=torch.float64)
    keep_N = m2po_mask(log_ratio_N, advantage_N, limit)
    bound_N = advantage_N * log_ratio_N > 0
    kept, masked = log_ratio_N[keep_N & bound_N].square(), log_ratio_N[~keep_N].square()
    assert bool(keep_N[~bound_N].all())
    assert kept.numel() == 0 or kept.mean() <= limit * (1 + 1e-5)
    if masked.numel():
        assert (kept.sum() + masked.min()) / (kept.numel() + 1) > limit
        assert kept.numel() == 0 or kept.max() <= masked.min()
