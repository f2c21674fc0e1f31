"""R²VPO, V and the choice of the objective, against arithmetic that can be redone by hand."""

from math import exp, log

import pytest
import torch

from r2vpo.algorithm.config import BRAKES, AlgorithmConfig
from r2vpo.algorithm.objectives import (
    loss_denominator,
    needs_proximal,
    objective,
    r2vpo,
    r2vpo_sequence,
    second_moment_sum,
)
from r2vpo.algorithm.tokens import TokenBatch, reweighting
from tests.algorithm.token_batches import gain_gradient, make_tokens, values


def test_r2vpo_is_weighted_gain_minus_penalty():
    tokens = make_tokens([1.5, 0.5], w=[1.2, 1.0], advantage=[1.0, -2.0])
    # token 1: 1.2·1.5·1 - 0.5·0.25 = 1.675; token 2: 0.5·(-2) - 0.5·0.25 = -1.125; -(0.55)/4
    loss = r2vpo(tokens, 4, 0.5, brake="everywhere", weight_cap=2.0)
    assert loss.item() == pytest.approx(-0.1375, abs=1e-12)


def test_r2vpo_gradient_weight_is_u_times_wa_minus_brake():
    tokens = make_tokens([1.5, 0.5], w=[1.2, 1.0], advantage=[1.0, -2.0])
    # u·(w·A - 2λ(u-1)) / 4: 1.5·(1.2 - 0.5)/4 = 0.2625 and 0.5·(-2 + 0.5)/4 = -0.1875
    loss = r2vpo(tokens, 4, 0.5, brake="everywhere", weight_cap=2.0)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.2625, -0.1875))


def test_the_brake_balances_the_advantage_at_u_star_and_pulls_back_beyond():
    # u* = 1 + wA/(2λ) = 1 + 1.5·0.8/(2·0.5) = 2.2
    tokens = make_tokens([2.1, 2.2, 2.3], w=1.5, advantage=0.8)
    gradient = gain_gradient(r2vpo(tokens, 1, 0.5, brake="gated", weight_cap=2.0), tokens)
    assert gradient[0] > 0
    assert gradient[1].item() == pytest.approx(0.0, abs=1e-12)
    assert gradient[2] < 0


def test_a_saturating_brake_lets_go_at_u_star_where_the_gain_is_largest():
    # λ = 0.5; A = 1, w = 1.5: u* = 2.5, gain 1.5·2.5 - 0.5·1.5² = 2.625; A = -0.5: u* = 0.5, gain -0.25 - 0.125
    w, advantage = [1.5, 1.5, 1.5, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, -0.5, -0.5, -1.0]
    tokens = make_tokens([2.0, 2.5, 4.0, 0.6, 0.1, 3.0], w=w, advantage=advantage)
    gains = [-r2vpo(part, 1, 0.5, brake="saturating", weight_cap=2.0).item() for part in singly(tokens)]
    # short of u*: 1.5·2 - 0.5·1² = 2.5, and -0.5·0.6 - 0.5·0.4² = -0.38; against its advantage: -1·3
    assert gains == pytest.approx([2.5, 2.625, 2.625, -0.38, -0.375, -3.0])
    # u·(w·A - (u - 1)): 2·(1.5 - 1) = 1 and 0.6·(-0.5 + 0.4) = -0.06; none beyond; u·A against the advantage
    gradient = gain_gradient(r2vpo(tokens, 1, 0.5, brake="saturating", weight_cap=2.0), tokens)
    torch.testing.assert_close(gradient, values(1.0, 0.0, 0.0, -0.06, 0.0, -3.0))


def singly(tokens):
    """Each token alone."""
    return [
        TokenBatch(**{key: value[n : n + 1] for key, value in vars(tokens).items() if value is not None})
        for n in range(len(tokens.logp_N))
    ]


def test_an_asymmetric_brake_lets_go_what_has_risen_and_pulls_back_what_has_fallen():
    tokens = make_tokens([4.0, 0.1, 0.6], w=[1.5, 1.0, 1.0], advantage=[1.0, -0.5, -0.5])
    loss = r2vpo(tokens, 1, 0.5, brake="asymmetric", weight_cap=2.0)
    # risen beyond u* = 2.5: the gain there; fallen below u* = 0.5: -0.05 - 0.5·0.9²; not yet: -0.3 - 0.5·0.4²
    assert loss.item() == pytest.approx(-(2.625 - 0.455 - 0.38))
    # none; 0.1·(-0.5 + 0.9); 0.6·(-0.5 + 0.4)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.0, 0.04, -0.06))


def test_what_has_fallen_is_pulled_back_with_half_of_lambda_at_most():
    tokens = make_tokens([u / 100 for u in range(1, 100)], advantage=-1e-9)
    pull = gain_gradient(r2vpo(tokens, 1, 3.0, brake="asymmetric", weight_cap=2.0), tokens)
    # u·2λ(1 - u) is largest at u = 1/2
    assert pull.argmax().item() == 49
    assert pull.max().item() == pytest.approx(1.5)


@pytest.mark.parametrize("brake", ["asymmetric", "saturating"])
def test_short_of_u_star_every_brake_with_a_gate_is_the_same(brake):
    tokens = make_tokens([1.4, 0.7, 1.3, 0.6, 1.2], w=[2.0, 1.0, 0.5, 1.0, 1.0], advantage=[1.0, 1.0, 2.0, -1.0, 0.0])
    losses = [r2vpo(tokens, 3, 0.7, brake=which, weight_cap=2.0) for which in (brake, "gated")]
    assert losses[0].item() == losses[1].item()
    assert torch.equal(*(gain_gradient(loss, tokens) for loss in losses))


def test_the_gate_brakes_only_tokens_that_move_where_their_advantage_pushes():
    tokens = make_tokens([1.5, 0.5, 1.5, 0.5, 1.5], advantage=[1.0, 1.0, -1.0, -1.0, 0.0])
    # braked are token 1 (A > 0, u > 1) and token 4 (A < 0, u < 1): u·(A - (u-1)) at λ = 1/2; the others keep u·A
    gradient = gain_gradient(r2vpo(tokens, 1, 0.5, brake="gated", weight_cap=2.0), tokens)
    torch.testing.assert_close(gradient, values(0.75, 0.5, -1.5, -0.25, 0.0))


def test_where_every_token_runs_away_the_gate_changes_nothing():
    tokens = make_tokens([1.3, 0.6], advantage=[1.0, -1.0])
    gated = r2vpo(tokens, 2, 0.7, brake="gated", weight_cap=2.0)
    plain = r2vpo(tokens, 2, 0.7, brake="everywhere", weight_cap=2.0)
    torch.testing.assert_close(gain_gradient(gated, tokens), gain_gradient(plain, tokens))


@pytest.mark.parametrize("brake", BRAKES)
def test_without_lambda_it_is_importance_sampling_with_bounded_reweighting(brake):
    tokens = make_tokens([1.5, 0.5], w=[1.5, 8.0], advantage=[1.0, -2.0])
    # w = 1.5 and min(8, 2) = 2: -(1.5·1.5·1 + 2·0.5·(-2)) = -0.25
    loss = r2vpo(tokens, 1, 0.0, brake=brake, weight_cap=2.0)
    assert loss.item() == pytest.approx(-0.25, abs=1e-12)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(2.25, -2.0))


def test_reweighting_is_bounded_above_only_and_carries_no_gradient():
    tokens = make_tokens([1.0, 1.0, 1.0], w=[0.01, 1.0, 7.0])
    weight_N = reweighting(tokens, 2.0)
    torch.testing.assert_close(weight_N, values(0.01, 1.0, 2.0))
    assert not weight_N.requires_grad


@pytest.mark.parametrize("brake", ["gated", "everywhere"])
def test_a_token_beyond_the_limit_is_still_pulled_back(brake):
    tokens = TokenBatch(
        logp_N=torch.tensor([10.0, 50.0], requires_grad=True),
        logp_prox_N=torch.zeros(2),
        behavior_logp_N=torch.zeros(2),
        advantage_N=torch.ones(2),
    )
    at_limit, beyond = gain_gradient(r2vpo(tokens, 1, 0.5, brake=brake, weight_cap=2.0), tokens)
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
    loss = r2vpo(tokens, 1, 1.0, brake="everywhere", weight_cap=2.0)
    assert loss.item() == pytest.approx(1e-12, rel=1e-4, abs=0)
    assert second_moment_sum(tokens).item() == pytest.approx(1e-12, rel=1e-4, abs=0)


def test_the_second_moment_is_that_of_the_update_ratio_and_detached():
    tokens = make_tokens([1.5, 0.8, 1.0], w=[1.0, 2.0, 3.0])
    total = second_moment_sum(tokens)  # 0.25 + 0.04 + 0
    assert total.item() == pytest.approx(0.29)
    assert not total.requires_grad


def test_the_sequence_ratio_is_the_geometric_mean_of_a_trajectory():
    # trajectory 0: u = sqrt(1.5·0.6) = sqrt(0.9), w = sqrt(1.2·1.8) = sqrt(2.16); trajectory 1 has one token
    tokens = make_tokens([1.5, 0.6, 0.5], w=[1.2, 1.8, 1.0], advantage=[1.0, 1.0, -2.0], sequence=[0, 0, 1])
    u, w = 0.9**0.5, 2.16**0.5
    gain = 2 * (w * u - 0.5 * (u - 1) ** 2) + (0.5 * -2.0 - 0.5 * 0.25)
    loss = r2vpo_sequence(tokens, 3, 0.5, brake="everywhere", weight_cap=2.0)
    assert loss.item() == pytest.approx(-gain / 3, abs=1e-12)
    # every token of a trajectory has the weight of `r2vpo` at the trajectory's ratio: u·(w·A - 2λ(u - 1))/3
    first, second = u * (w - (u - 1)) / 3, 0.5 * (-2.0 + 0.5) / 3
    torch.testing.assert_close(gain_gradient(loss, tokens), values(first, first, second))


def test_the_reweighting_of_a_sequence_is_capped_after_the_mean():
    # sqrt(0.25·9) = 1.5 although the second token alone would be capped at 2; 3 is capped
    tokens = make_tokens([1.0, 1.0, 1.0], w=[0.25, 9.0, 3.0], sequence=[0, 0, 1])
    loss = r2vpo_sequence(tokens, 1, 0.5, brake="everywhere", weight_cap=2.0)
    assert loss.item() == pytest.approx(-(1.5 + 1.5 + 2.0))


def test_the_gate_of_a_sequence_looks_at_the_sequence_ratio():
    # the second token alone moved against its advantage, the trajectory with it: u = sqrt(2·0.72) = 1.2
    tokens = make_tokens([2.0, 0.72], sequence=[0, 0])
    weight = gain_gradient(r2vpo_sequence(tokens, 1, 0.5, brake="gated", weight_cap=2.0), tokens)
    torch.testing.assert_close(weight, values(1.2 * (1 - 0.2), 1.2 * (1 - 0.2)))


@pytest.mark.parametrize(
    ("name", "expected"),
    # u = 1.5, w = 4 capped at 3, ρ = 6, A = 1, logp = -1.5 + log 1.5; clip above at 1.3, λ = 0.5
    [
        ("r2vpo", 3 * 1.5 - 0.5 * 0.25),
        ("r2vpo_sequence", 3 * 1.5 - 0.5 * 0.25),
        ("grpo", 1.3),
        ("grpo_decoupled", 3 * 1.3),
        ("gspo", 1.3),
        ("cispo", 1.3 * (-1.5 + log(1.5))),
        ("spo", 6 - 25 / 0.6),
        ("sapo", 2 / (1 + exp(-2 * 5))),
        ("m2po", 0.0),
        ("truncated_is", 3 * (-1.5 + log(1.5))),
        ("plain_is", 6.0),
    ],
)
def test_the_name_and_settings_of_the_config_choose_the_objective(name, expected):
    config = AlgorithmConfig(name=name, weight_cap=3.0, clip_high=0.3, tau_positive=2.0, m2_limit=0.1)
    loss = objective(config)(make_tokens([1.5], w=4.0), 1.0, 0.5)
    assert -loss.item() == pytest.approx(expected)


def test_the_denominator_counts_tokens_trajectories_or_their_fixed_length():
    assert loss_denominator(AlgorithmConfig(), 12, 5) == 12.0
    assert loss_denominator(AlgorithmConfig(loss_mean="sequence"), 12, 5) == 5.0
    assert loss_denominator(AlgorithmConfig(loss_mean="constant", loss_length=100), 12, 5) == 500.0


@pytest.mark.parametrize(
    ("settings", "expected"),
    # on-policy, A = 1 for an answer of one token and -1 for one of three: what each token weighs
    [
        ({"loss_mean": "token"}, (1 / 4, -1 / 4, -1 / 4, -1 / 4)),
        ({"loss_mean": "sequence"}, (1 / 2, -1 / 6, -1 / 6, -1 / 6)),
        ({"loss_mean": "constant", "loss_length": 10}, (1 / 20, -1 / 20, -1 / 20, -1 / 20)),
    ],
)
@pytest.mark.parametrize("name", ["r2vpo", "grpo", "gspo"])
def test_the_mean_decides_what_a_token_of_a_long_answer_weighs(name, settings, expected):
    config = AlgorithmConfig(name=name, **settings)
    tokens = make_tokens([1.0] * 4, advantage=[1.0, -1.0, -1.0, -1.0], sequence=[0, 1, 1, 1])
    loss = objective(config)(tokens, loss_denominator(config, 4, 2), 0.5)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(*expected))


def test_a_mean_over_trajectories_keeps_the_weight_of_the_draw_and_leaves_v_alone():
    config = AlgorithmConfig(loss_mean="sequence")
    tokens = make_tokens([1.5, 0.5, 1.0], draw_weight=[3.0, 3.0, 1.0], sequence=[0, 0, 1])
    # λ = 0: -(3·(1.5 + 0.5)/2 + 1)/2
    assert objective(config)(tokens, 2.0, 0.0).item() == pytest.approx(-2.0)
    assert second_moment_sum(tokens).item() == pytest.approx(3 * (0.25 + 0.25))


def test_a_mean_over_trajectories_needs_to_know_them():
    tokens = make_tokens([1.0])
    unknown = TokenBatch(**{**vars(tokens), "sequence_N": None})
    with pytest.raises(AssertionError, match=r"needs TokenBatch\.sequence_N"):
        objective(AlgorithmConfig(loss_mean="sequence", brake="everywhere"))(unknown, 1.0, 0.5)


def test_a_draw_weight_multiplies_loss_gradient_and_second_moment_but_not_the_count_of_tokens():
    tokens = make_tokens([1.5, 0.5], w=[1.2, 1.0], advantage=[1.0, -2.0], draw_weight=[3.0, 0.5])
    # the terms of the first test: 3·1.675 + 0.5·(-1.125) = 4.4625; -(4.4625)/4
    loss = r2vpo(tokens, 4, 0.5, brake="everywhere", weight_cap=2.0)
    assert loss.item() == pytest.approx(-1.115625, abs=1e-12)
    # 3·0.2625 and 0.5·(-0.1875)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.7875, -0.09375))
    assert second_moment_sum(tokens).item() == pytest.approx(3 * 0.25 + 0.5 * 0.25)


def test_the_second_moment_is_exact_where_float32_overflows():
    tokens = make_tokens([1.0], dtype=torch.float32)
    far = TokenBatch(
        logp_N=tokens.logp_prox_N + 50,
        logp_prox_N=tokens.logp_prox_N,
        behavior_logp_N=tokens.behavior_logp_N,
        advantage_N=tokens.advantage_N,
    )
    assert log(second_moment_sum(far).item()) == pytest.approx(100.0)


def test_a_minibatch_without_tokens_has_no_loss():
    with pytest.raises(AssertionError, match="without trained tokens"):
        r2vpo(make_tokens([]), 0, 0.5, brake="everywhere", weight_cap=2.0)


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
