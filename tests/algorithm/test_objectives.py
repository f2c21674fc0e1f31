"""The objectives against arithmetic that can be redone by hand, and their gradients."""

from math import log

import pytest
import torch

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.objectives import (
    TokenBatch,
    grpo_clip,
    grpo_decoupled,
    needs_proximal,
    objective,
    r2vpo,
    reweighting,
    second_moment_sum,
)

ALL = {
    "r2vpo": objective(AlgorithmConfig(name="r2vpo"), gated=False),
    "r2vpo_gated": objective(AlgorithmConfig(name="r2vpo"), gated=True),
    "grpo": objective(AlgorithmConfig(name="grpo"), gated=False),
    "grpo_decoupled": objective(AlgorithmConfig(name="grpo_decoupled"), gated=False),
}


def make_tokens(u, *, w=1.0, advantage=1.0, draw_weight=None, dtype=torch.float64):
    """Tokens with the given update ratios, uncapped reweightings, advantages and weights; ``logp_N`` is a leaf."""
    u_N = torch.tensor(u, dtype=dtype)
    logp_prox_N = torch.full_like(u_N, -1.5)
    return TokenBatch(
        logp_N=(logp_prox_N + u_N.log()).requires_grad_(),
        logp_prox_N=logp_prox_N,
        behavior_logp_N=logp_prox_N - torch.as_tensor(w, dtype=dtype).expand_as(u_N).log(),
        advantage_N=torch.as_tensor(advantage, dtype=dtype).expand_as(u_N).clone(),
        draw_weight_N=None if draw_weight is None else torch.as_tensor(draw_weight, dtype=dtype).expand_as(u_N).clone(),
    )


def gain_gradient(loss, tokens):
    """d(-loss)/d(logp), the gradient weights."""
    return -torch.autograd.grad(loss, tokens.logp_N)[0]


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def test_r2vpo_is_weighted_gain_minus_penalty():
    tokens = make_tokens([1.5, 0.5], w=[1.2, 1.0], advantage=[1.0, -2.0])
    # token 1: 1.2·1.5·1 - 0.5·0.25 = 1.675; token 2: 0.5·(-2) - 0.5·0.25 = -1.125; -(0.55)/4
    loss = r2vpo(tokens, num_tokens=4, lam=0.5, gated=False, weight_cap=2.0)
    assert loss.item() == pytest.approx(-0.1375, abs=1e-12)


def test_r2vpo_gradient_weight_is_u_times_wa_minus_brake():
    tokens = make_tokens([1.5, 0.5], w=[1.2, 1.0], advantage=[1.0, -2.0])
    # u·(w·A - 2λ(u-1)) / 4: 1.5·(1.2 - 0.5)/4 = 0.2625 and 0.5·(-2 + 0.5)/4 = -0.1875
    loss = r2vpo(tokens, num_tokens=4, lam=0.5, gated=False, weight_cap=2.0)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.2625, -0.1875))


def test_the_brake_balances_the_advantage_at_u_star_and_pulls_back_beyond():
    # u* = 1 + wA/(2λ) = 1 + 1.5·0.8/(2·0.5) = 2.2
    tokens = make_tokens([2.1, 2.2, 2.3], w=1.5, advantage=0.8)
    gradient = gain_gradient(r2vpo(tokens, num_tokens=1, lam=0.5, gated=True, weight_cap=2.0), tokens)
    assert gradient[0] > 0
    assert gradient[1].item() == pytest.approx(0.0, abs=1e-12)
    assert gradient[2] < 0


def test_the_gate_brakes_only_tokens_that_move_where_their_advantage_pushes():
    tokens = make_tokens([1.5, 0.5, 1.5, 0.5, 1.5], advantage=[1.0, 1.0, -1.0, -1.0, 0.0])
    # braked are token 1 (A > 0, u > 1) and token 4 (A < 0, u < 1): u·(A - (u-1)) at λ = 1/2; the others keep u·A
    gradient = gain_gradient(r2vpo(tokens, num_tokens=1, lam=0.5, gated=True, weight_cap=2.0), tokens)
    torch.testing.assert_close(gradient, values(0.75, 0.5, -1.5, -0.25, 0.0))


def test_where_every_token_runs_away_the_gate_changes_nothing():
    tokens = make_tokens([1.3, 0.6], advantage=[1.0, -1.0])
    gated = r2vpo(tokens, num_tokens=2, lam=0.7, gated=True, weight_cap=2.0)
    plain = r2vpo(tokens, num_tokens=2, lam=0.7, gated=False, weight_cap=2.0)
    torch.testing.assert_close(gain_gradient(gated, tokens), gain_gradient(plain, tokens))


@pytest.mark.parametrize("gated", [True, False])
def test_without_lambda_it_is_importance_sampling_with_bounded_reweighting(gated):
    tokens = make_tokens([1.5, 0.5], w=[1.5, 8.0], advantage=[1.0, -2.0])
    # w = 1.5 and min(8, 2) = 2: -(1.5·1.5·1 + 2·0.5·(-2)) = -0.25
    loss = r2vpo(tokens, num_tokens=1, lam=0.0, gated=gated, weight_cap=2.0)
    assert loss.item() == pytest.approx(-0.25, abs=1e-12)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(2.25, -2.0))


def test_reweighting_is_bounded_above_only_and_carries_no_gradient():
    tokens = make_tokens([1.0, 1.0, 1.0], w=[0.01, 1.0, 7.0])
    weight_N = reweighting(tokens, 2.0)
    torch.testing.assert_close(weight_N, values(0.01, 1.0, 2.0))
    assert not weight_N.requires_grad


def test_no_gradient_reaches_the_proximal_and_behavior_logprobs():
    logp, prox, behavior = (torch.tensor([x], requires_grad=True) for x in (-1.0, -1.1, -1.2))
    for loss in ALL.values():
        tokens = TokenBatch(logp_N=logp, logp_prox_N=prox, behavior_logp_N=behavior, advantage_N=torch.ones(1))
        gradients = torch.autograd.grad(loss(tokens, 1.0, 0.5), (logp, prox, behavior), allow_unused=True)
        assert gradients[0] is not None
        assert gradients[1:] == (None, None)


@pytest.mark.parametrize("name", ALL)
def test_at_lag_0_the_first_step_is_the_policy_gradient(name):
    tokens = make_tokens([1.0, 1.0, 1.0], advantage=[2.0, -1.0, 0.0])
    loss = ALL[name](tokens, 5.0, 0.5)
    assert loss.item() == pytest.approx(-0.2)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.4, -0.2, 0.0))


@pytest.mark.parametrize("name", ALL)
def test_gradients_match_finite_differences(name):
    fixed = make_tokens([0.7, 0.9, 1.1, 1.4, 1.1], w=[0.5, 1.3, 5.0, 1.0, 1.0], advantage=[1.0, -1.0, 0.5, -2.0, 1.0])

    def loss(logp_N):
        tokens = TokenBatch(
            logp_N=logp_N,
            logp_prox_N=fixed.logp_prox_N,
            behavior_logp_N=fixed.behavior_logp_N,
            advantage_N=fixed.advantage_N,
        )
        return ALL[name](tokens, 3.0, 0.6)

    assert torch.autograd.gradcheck(loss, (fixed.logp_N,))


def test_grpo_clips_the_plain_ratio():
    tokens = make_tokens([1.5, 0.5, 1.5, 0.5, 1.1], advantage=[1.0, 1.0, -1.0, -1.0, 1.0])
    # min(ρA, clip(ρ)A): 1.3, 0.5, -1.5, -0.8, 1.1; sum 0.6
    loss = grpo_clip(tokens, num_tokens=2, clip_low=0.2, clip_high=0.3)
    assert loss.item() == pytest.approx(-0.3)
    # silent: 1 and 4, which moved past the clip in their advantage's direction; the others have weight ρ·A / 2
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.0, 0.25, -0.75, 0.0, 0.55))


def test_grpo_takes_the_ratio_to_the_behavior_policy():
    # u = 1.1 and w = 1.5: ρ = 1.65 is clipped to 1.2, although the update ratio is within the clip
    tokens = make_tokens([1.1], w=1.5)
    loss = grpo_clip(tokens, num_tokens=1, clip_low=0.2, clip_high=0.2)
    assert loss.item() == pytest.approx(-1.2)
    assert gain_gradient(loss, tokens).item() == 0.0


def test_decoupled_grpo_clips_the_update_ratio_and_reweights_within_the_cap():
    tokens = make_tokens([1.1, 1.5, 0.9], w=[1.5, 0.5, 9.0], advantage=[1.0, 1.0, -1.0])
    # 1.5·1.1 + 0.5·1.2 - 2·0.9 = 0.45
    loss = grpo_decoupled(tokens, num_tokens=1, clip_low=0.2, clip_high=0.2, weight_cap=2.0)
    assert loss.item() == pytest.approx(-0.45)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(1.65, 0.0, -1.8))


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_add_up_to_the_minibatch(name):
    u, w, advantage = [0.5, 0.9, 1.2, 1.6, 1.0], [1.0, 3.0, 0.4, 1.1, 1.0], [1.0, -1.0, 2.0, -0.5, 0.0]
    whole = make_tokens(u, w=w, advantage=advantage)
    parts = [
        make_tokens(u[span], w=w[span], advantage=advantage[span])
        for span in (slice(0, 2), slice(2, 2), slice(2, 3), slice(3, 5))
    ]
    losses = [ALL[name](part, 5.0, 0.5) for part in parts]
    loss = ALL[name](whole, 5.0, 0.5)
    assert sum(x.item() for x in losses) == pytest.approx(loss.item(), abs=1e-15)
    gradients = [gain_gradient(x, part) for x, part in zip(losses, parts, strict=True)]
    torch.testing.assert_close(torch.cat(gradients), gain_gradient(loss, whole))
    sums = sum(second_moment_sum(part).item() for part in parts)
    assert sums == pytest.approx(second_moment_sum(whole).item(), abs=1e-15)


@pytest.mark.parametrize("name", ALL)
def test_log_ratios_of_fifty_give_finite_losses_and_gradients_in_float32(name):
    extreme = torch.tensor([50.0, -50.0, 50.0, -50.0])
    for prox, behavior in ((0.0, 0.0), (extreme, 0.0), (0.0, extreme), (-extreme, extreme)):
        tokens = TokenBatch(
            logp_N=extreme.clone().requires_grad_(),
            logp_prox_N=torch.zeros(4) + prox,
            behavior_logp_N=torch.zeros(4) + behavior,
            advantage_N=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        )
        loss = ALL[name](tokens, 4.0, 0.5)
        gradient = gain_gradient(loss, tokens)
        assert loss.isfinite()
        assert gradient.square().sum().isfinite()
        assert second_moment_sum(tokens).isfinite()


@pytest.mark.parametrize("gated", [True, False])
def test_a_token_beyond_the_limit_is_still_pulled_back(gated):
    tokens = TokenBatch(
        logp_N=torch.tensor([10.0, 50.0], requires_grad=True),
        logp_prox_N=torch.zeros(2),
        behavior_logp_N=torch.zeros(2),
        advantage_N=torch.ones(2),
    )
    at_limit, beyond = gain_gradient(r2vpo(tokens, num_tokens=1, lam=0.5, gated=gated, weight_cap=2.0), tokens)
    assert beyond == at_limit
    assert beyond < -1e8  # u·(A - (u-1)) = -e^10·(e^10 - 2) = -4.85e8


def test_the_penalty_keeps_its_precision_near_u_1():
    # u - 1 = 1e-6 is below half a unit in float32's last place at 1, where exp(x) - 1 would give 0.95e-6
    tokens = TokenBatch(
        logp_N=torch.tensor([1e-6]),
        logp_prox_N=torch.zeros(1),
        behavior_logp_N=torch.zeros(1),
        advantage_N=torch.zeros(1),
    )
    loss = r2vpo(tokens, num_tokens=1, lam=1.0, gated=False, weight_cap=2.0)
    assert loss.item() == pytest.approx(1e-12, rel=1e-4, abs=0)
    assert second_moment_sum(tokens).item() == pytest.approx(1e-12, rel=1e-4, abs=0)


def test_the_second_moment_is_that_of_the_update_ratio_and_detached():
    tokens = make_tokens([1.5, 0.8, 1.0], w=[1.0, 2.0, 3.0])
    total = second_moment_sum(tokens)  # 0.25 + 0.04 + 0
    assert total.item() == pytest.approx(0.29)
    assert not total.requires_grad


def test_a_draw_weight_multiplies_loss_gradient_and_second_moment_but_not_the_count_of_tokens():
    tokens = make_tokens([1.5, 0.5], w=[1.2, 1.0], advantage=[1.0, -2.0], draw_weight=[3.0, 0.5])
    # the terms of the first test: 3·1.675 + 0.5·(-1.125) = 4.4625; -(4.4625)/4
    loss = r2vpo(tokens, num_tokens=4, lam=0.5, gated=False, weight_cap=2.0)
    assert loss.item() == pytest.approx(-1.115625, abs=1e-12)
    # 3·0.2625 and 0.5·(-0.1875)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.7875, -0.09375))
    assert second_moment_sum(tokens).item() == pytest.approx(3 * 0.25 + 0.5 * 0.25)


@pytest.mark.parametrize("name", ALL)
def test_a_group_drawn_once_with_weight_2_is_the_group_drawn_twice(name):
    u, w, advantage = [0.5, 1.4, 1.1], [1.0, 3.0, 0.4], [1.0, -1.0, 2.0]
    weighted = make_tokens(u, w=w, advantage=advantage, draw_weight=2.0)
    plain = make_tokens(u, w=w, advantage=advantage)
    loss, once = ALL[name](weighted, 6.0, 0.5), ALL[name](plain, 6.0, 0.5)
    assert loss.item() == pytest.approx(2 * once.item(), abs=1e-15)
    torch.testing.assert_close(gain_gradient(loss, weighted), 2 * gain_gradient(once, plain))
    assert second_moment_sum(weighted).item() == pytest.approx(2 * second_moment_sum(plain).item())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_of_weight_1_are_bit_for_bit_those_without_a_weight(name, dtype):
    generator = torch.Generator().manual_seed(0)
    u, w = torch.rand(2, 101, generator=generator) * 2 + 0.05
    advantage = torch.randn(101, generator=generator)
    both = [
        make_tokens(u.tolist(), w=w.tolist(), advantage=advantage.tolist(), draw_weight=weight, dtype=dtype)
        for weight in (None, 1.0)
    ]
    losses = [ALL[name](tokens, 101.0, 0.5) for tokens in both]
    assert losses[0].item() == losses[1].item()
    assert torch.equal(*(gain_gradient(loss, tokens) for loss, tokens in zip(losses, both, strict=True)))
    assert second_moment_sum(both[0]).item() == second_moment_sum(both[1]).item()


def test_the_second_moment_is_exact_where_float32_overflows():
    tokens = make_tokens([1.0], dtype=torch.float32)
    far = TokenBatch(
        logp_N=tokens.logp_prox_N + 50,
        logp_prox_N=tokens.logp_prox_N,
        behavior_logp_N=tokens.behavior_logp_N,
        advantage_N=tokens.advantage_N,
    )
    assert log(second_moment_sum(far).item()) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    # u = 1.5, w = 4 capped at 3, A = 1: r2vpo 3·1.5 - 0.5·0.25; grpo clip(6) = 1.3; decoupled 3·1.3
    [("r2vpo", 4.375), ("grpo", 1.3), ("grpo_decoupled", 3.9)],
)
def test_the_name_and_settings_of_the_config_choose_the_objective(name, expected):
    config = AlgorithmConfig(name=name, weight_cap=3.0, clip_high=0.3)
    assert -objective(config, gated=True)(make_tokens([1.5], w=4.0), 1.0, 0.5).item() == pytest.approx(expected)


def test_a_minibatch_without_tokens_has_no_loss():
    with pytest.raises(AssertionError, match="without trained tokens"):
        r2vpo(make_tokens([]), num_tokens=0, lam=0.5, gated=False, weight_cap=2.0)


def test_the_tensors_of_a_token_batch_must_agree():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(AssertionError, match="share"):
        TokenBatch(logp_N=one, logp_prox_N=one, behavior_logp_N=one, advantage_N=two)


@pytest.mark.parametrize(
    ("version", "step", "expected"),
    [(3, 3, False), (2, 3, True), ([3, 2], 3, True), ([3, 3], 3, False)],
)
def test_proximal_logprobs_are_needed_where_any_token_lags(make_trajectory, version, step, expected):
    assert needs_proximal(make_trajectory([1, 2], version=version), step) is expected


def test_an_empty_response_needs_no_proximal_logprobs(make_trajectory):
    assert needs_proximal(make_trajectory([]), 5) is False
