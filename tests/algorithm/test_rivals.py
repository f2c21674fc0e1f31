"""The objectives that R²VPO is compared with, against arithmetic that can be redone by hand."""

from math import exp, log

import pytest
import torch

from r2vpo.algorithm.rivals import cispo, grpo, grpo_decoupled, gspo, plain_is, sapo, spo, truncated_is
from tests.algorithm.token_batches import gain_gradient, make_tokens, values


def test_plain_is_takes_the_ratio_to_the_behavior_policy():
    tokens = make_tokens([1.5, 0.5], w=[2.0, 1.0], advantage=[1.0, -2.0])
    loss = plain_is(tokens, 4, 0.0)  # -(3·1 + 0.5·(-2))/4
    assert loss.item() == pytest.approx(-0.5)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.75, -0.25))


def test_truncated_is_caps_the_weight_and_silences_nobody():
    tokens = make_tokens([1.0, 1.0, 1.0], w=[0.5, 1.5, 7.0], advantage=[1.0, -1.0, 1.0])
    loss = truncated_is(tokens, 1, 0.0, weight_cap=2.0)  # logp is -1.5: -(0.5 - 1.5 + 2)·(-1.5)
    assert loss.item() == pytest.approx(1.5)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.5, -1.5, 2.0))


def test_cispo_clips_the_weight_on_both_sides_whatever_the_advantage():
    tokens = make_tokens([0.5, 0.5, 1.1, 1.6, 1.6], advantage=[1.0, -1.0, 1.0, 1.0, -1.0])
    loss = cispo(tokens, 2, 0.0, clip_low=0.2, clip_high=0.3)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.4, -0.4, 0.55, 0.65, -0.65))
    # the gains of the first two and of the last two cancel: -(1.1·(-1.5 + log 1.1))/2
    assert loss.item() == pytest.approx(-1.1 * (-1.5 + log(1.1)) / 2)


def test_grpo_clips_the_plain_ratio():
    tokens = make_tokens([1.5, 0.5, 1.5, 0.5, 1.1], advantage=[1.0, 1.0, -1.0, -1.0, 1.0])
    # min(ρA, clip(ρ)A): 1.3, 0.5, -1.5, -0.8, 1.1; sum 0.6
    loss = grpo(tokens, 2, 0.0, clip_low=0.2, clip_high=0.3)
    assert loss.item() == pytest.approx(-0.3)
    # silent: 1 and 4, which moved past the clip in their advantage's direction; the others have weight ρ·A / 2
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.0, 0.25, -0.75, 0.0, 0.55))


def test_grpo_takes_the_ratio_to_the_behavior_policy():
    # u = 1.1 and w = 1.5: ρ = 1.65 is clipped to 1.2, although the update ratio is within the clip
    tokens = make_tokens([1.1], w=1.5)
    loss = grpo(tokens, 1, 0.0, clip_low=0.2, clip_high=0.2)
    assert loss.item() == pytest.approx(-1.2)
    assert gain_gradient(loss, tokens).item() == 0.0


def test_clip_higher_frees_only_tokens_that_rise():
    # DAPO: 1.25 is within 0.28 above, 0.75 outside 0.2 below
    tokens = make_tokens([1.25, 0.75], advantage=[1.0, -1.0])
    loss = grpo(tokens, 1, 0.0, clip_low=0.2, clip_high=0.28)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(1.25, 0.0))


def test_decoupled_grpo_clips_the_update_ratio_and_reweights_within_the_cap():
    tokens = make_tokens([1.1, 1.5, 0.9], w=[1.5, 0.5, 9.0], advantage=[1.0, 1.0, -1.0])
    # 1.5·1.1 + 0.5·1.2 - 2·0.9 = 0.45
    loss = grpo_decoupled(tokens, 1, 0.0, clip_low=0.2, clip_high=0.2, weight_cap=2.0)
    assert loss.item() == pytest.approx(-0.45)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(1.65, 0.0, -1.8))


def test_gspo_clips_trajectories_by_the_geometric_mean_of_their_ratios():
    # s = sqrt(1.8·0.7) = sqrt(1.26) = 1.122 is within the clip of 0.2, though both tokens are outside; 1.3 is not
    tokens = make_tokens([1.8, 0.7, 1.3], sequence=[0, 0, 1])
    loss = gspo(tokens, 3, 0.0, clip_low=0.2, clip_high=0.2)
    s = 1.26**0.5
    assert loss.item() == pytest.approx(-(2 * s + 1.2) / 3)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(s / 3, s / 3, 0.0))


def test_spo_has_its_zero_at_the_edge_of_the_clip_and_pulls_back_beyond():
    tokens = make_tokens([1.1, 1.2, 1.3, 0.8, 0.8], advantage=[1.0, 1.0, 1.0, -2.0, 1.0])
    loss = spo(tokens, 1, 0.0, clip=0.2)
    # ρA - |A|/0.4·(ρ - 1)²: 1.1 - 0.025, 1.2 - 0.1, 1.3 - 0.225, -1.6 - 0.2, 0.8 - 0.1; sum 2.15
    assert loss.item() == pytest.approx(-2.15)
    # ρ·(A - |A|·(ρ - 1)/0.2): 1.1·0.5, 0, -1.3·0.5, 0.8·(-2 + 2), 0.8·2
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.55, 0.0, -0.65, 0.0, 1.6))


def test_sapo_fades_a_token_by_a_sigmoid_whose_temperature_follows_the_sign_of_the_advantage():
    tokens = make_tokens([1.0, 1.5, 1.5], advantage=[1.0, 1.0, -1.0])
    loss = sapo(tokens, 1, 0.0, tau_positive=1.0, tau_negative=2.0)
    up, down = 1 / (1 + exp(-0.5)), 1 / (1 + exp(-1.0))
    assert loss.item() == pytest.approx(-(4 * 0.5 + 4 * up - 2 * down))
    expected = values(1.0, 4 * up * (1 - up) * 1.5, -4 * down * (1 - down) * 1.5)
    torch.testing.assert_close(gain_gradient(loss, tokens), expected)
