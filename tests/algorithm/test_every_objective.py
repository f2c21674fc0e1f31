"""What holds for every objective: gradients, sums over micro-batches, extreme ratios, limits that coincide."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.objectives import objective, r2vpo, second_moment_sum
from r2vpo.algorithm.rivals import cispo, grpo, plain_is, sapo, spo
from r2vpo.algorithm.tokens import TokenBatch
from tests.algorithm.token_batches import ALL, GATED, OVER_TRAJECTORIES, gain_gradient, make_tokens, values

U = [0.7, 0.9, 1.1, 1.4, 1.1, 0.95]
W = [0.5, 1.3, 5.0, 1.0, 1.0, 0.8]
ADVANTAGE = [1.0, 1.0, -0.5, -0.5, -0.5, 2.0]
SEQUENCE = [0, 0, 1, 1, 1, 2]
KEEP = [True, False, True, True, False, True]

STOPPED = ("cispo", "truncated_is")
"""Their gradient is not that of their value: the ratio is a constant weight of logp."""
OF_VALUE_A = (
    *("r2vpo", *GATED, "r2vpo_sequence"),
    *("grpo", "grpo_decoupled", "gspo", "spo", "m2po", "plain_is"),
)
"""Those whose loss at u = 1 and lag 0 is the mean of -A."""


def with_logp(tokens, logp_N):
    return replace(tokens, logp_N=logp_N)


@pytest.mark.parametrize("name", ALL)
def test_at_lag_0_the_first_step_is_the_policy_gradient(name):
    tokens = make_tokens([1.0, 1.0, 1.0, 1.0], advantage=[2.0, 2.0, -1.0, 0.0], sequence=[0, 0, 1, 2])
    loss = ALL[name](tokens, 5.0, 0.5)
    torch.testing.assert_close(gain_gradient(loss, tokens), values(0.4, 0.4, -0.2, 0.0))
    if name in OF_VALUE_A:
        assert loss.item() == pytest.approx(-0.6)


@pytest.mark.parametrize("losses", [ALL, OVER_TRAJECTORIES])
@pytest.mark.parametrize("name", [n for n in OVER_TRAJECTORIES if n not in STOPPED])
def test_gradients_match_finite_differences(name, losses):
    fixed = make_tokens(U, w=W, advantage=ADVANTAGE, sequence=SEQUENCE, keep=KEEP, draw_weight=[1, 1, 2, 2, 2, 0.5])
    assert torch.autograd.gradcheck(lambda logp_N: losses[name](with_logp(fixed, logp_N), 3.0, 0.6), (fixed.logp_N,))


@pytest.mark.parametrize("name", GATED)
def test_gated_gradients_match_finite_differences(name):
    fixed = make_tokens(U, w=W, advantage=ADVANTAGE, sequence=SEQUENCE)
    assert torch.autograd.gradcheck(lambda logp_N: ALL[name](with_logp(fixed, logp_N), 3.0, 0.6), (fixed.logp_N,))


@pytest.mark.parametrize("name", STOPPED)
def test_where_the_ratio_is_a_constant_weight_finite_differences_match_with_the_weight_held(name):
    fixed = make_tokens(U, w=W, advantage=ADVANTAGE)
    # one token at a time, its logp moved by h and its ratio held by moving the behaviour log-prob along
    gradient = gain_gradient(ALL[name](fixed, 3.0, 0.0), fixed)
    h = 1e-6
    for n in range(len(U)):
        step_N = h * torch.eye(len(U), dtype=torch.float64)[n]
        up, down = (
            ALL[name](
                replace(fixed, logp_N=fixed.logp_N + s, behavior_logp_N=fixed.behavior_logp_N + s), 3.0, 0.0
            ).item()
            for s in (step_N, -step_N)
        )
        assert -(up - down) / (2 * h) == pytest.approx(gradient[n].item(), rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_reaches_the_proximal_and_behavior_logprobs(name):
    logp, prox, behavior = (torch.tensor([x], requires_grad=True) for x in (-1.0, -1.1, -1.2))
    tokens = TokenBatch(
        logp_N=logp,
        logp_prox_N=prox,
        behavior_logp_N=behavior,
        advantage_N=torch.ones(1),
        sequence_N=torch.zeros(1, dtype=torch.long),
    )
    gradients = torch.autograd.grad(ALL[name](tokens, 1.0, 0.5), (logp, prox, behavior), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1:] == (None, None)


def part_of(tokens, trajectories):
    """A micro-batch of whole trajectories, in this order, and the positions of its tokens."""
    index = torch.tensor([n for t in trajectories for n in range(len(SEQUENCE)) if SEQUENCE[n] == t], dtype=torch.long)
    fields = {key: value.detach()[index] for key, value in vars(tokens).items() if value is not None}
    local = [i for i, t in enumerate(trajectories) for _ in range(SEQUENCE.count(t))]
    fields["sequence_N"] = torch.tensor(local, dtype=torch.long)
    return TokenBatch(**{**fields, "logp_N": fields["logp_N"].requires_grad_()}), index


@pytest.mark.parametrize("losses", [ALL, OVER_TRAJECTORIES])
@pytest.mark.parametrize("name", OVER_TRAJECTORIES)
@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(3)), cuts=st.lists(st.integers(0, 3), min_size=2, max_size=4).map(sorted))
def test_micro_batches_in_any_packing_add_up_to_the_minibatch(name, losses, order, cuts):
    whole = make_tokens(
        U, w=W, advantage=ADVANTAGE, sequence=SEQUENCE, keep=KEEP, draw_weight=[1.0, 1.0, 2.0, 2.0, 2.0, 0.5]
    )
    loss = losses[name](whole, 6.0, 0.5)
    edges = [0, *cuts, 3]
    sums, gradient = 0.0, torch.zeros_like(whole.logp_N)
    for low, high in pairwise(edges):  # some of them are empty
        part, index = part_of(whole, order[low:high])
        share = losses[name](part, 6.0, 0.5)
        sums += share.item()
        gradient[index] += gain_gradient(share, part)
    assert sums == pytest.approx(loss.item(), abs=1e-14)
    torch.testing.assert_close(gradient, gain_gradient(loss, whole))


@pytest.mark.parametrize("losses", [ALL, OVER_TRAJECTORIES])
@pytest.mark.parametrize("name", OVER_TRAJECTORIES)
@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(*(st.floats(-50, 50, width=32) for _ in range(3)), st.floats(-3, 3, width=32), st.integers(0, 3)),
        min_size=1,
        max_size=8,
    )
)
def test_log_ratios_of_fifty_give_finite_losses_and_gradients_in_float32(name, losses, tokens):
    logp_N, prox_N, behavior_N, advantage_N, _ = torch.tensor(tokens, dtype=torch.float32).T
    ids = sorted({t[-1] for t in tokens})
    batch = TokenBatch(
        logp_N=logp_N.clone().requires_grad_(),
        logp_prox_N=prox_N,
        behavior_logp_N=behavior_N,
        advantage_N=advantage_N,
        sequence_N=torch.tensor([ids.index(t[-1]) for t in tokens]),
    )
    loss = losses[name](batch, 4.0, 0.5)
    assert loss.isfinite()
    assert gain_gradient(loss, batch).square().sum().isfinite()
    assert second_moment_sum(batch).isfinite()


@pytest.mark.parametrize("name", ALL)
def test_a_group_drawn_once_with_weight_2_is_the_group_drawn_twice(name):
    arguments = {"w": W, "advantage": ADVANTAGE, "sequence": SEQUENCE, "keep": KEEP}
    weighted, plain = make_tokens(U, draw_weight=2.0, **arguments), make_tokens(U, **arguments)
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


def loss_named(name, **settings):
    return objective(AlgorithmConfig(name=name, **settings, brake="everywhere"))


ON_POLICY = {"w": 1.0}
STALE = {"w": [0.5, 1.3, 1.9, 1.0, 1.0, 0.8]}
SINGLE = {"w": W, "sequence": list(range(len(U)))}
MILD = {"u": [0.85, 1.1, 1.15, 0.95, 1.0, 1.19], "w": 1.0}


@pytest.mark.parametrize(
    ("first", "second", "tokens"),
    [
        pytest.param(lambda t, n, _: loss_named("r2vpo")(t, n, 0.0), plain_is, STALE, id="r2vpo, λ = 0: plain IS"),
        pytest.param(
            lambda t, n, _: r2vpo(t, n, t.advantage_N.abs() / (2 * 0.3), brake="everywhere", weight_cap=2.0),
            lambda t, n, lam: spo(t, n, lam, clip=0.3),
            ON_POLICY,
            id="r2vpo, λ = |A|/2ε: SPO",
        ),
        pytest.param(loss_named("r2vpo_sequence"), loss_named("r2vpo"), SINGLE, id="answers of one token: r2vpo"),
        pytest.param(loss_named("gspo"), loss_named("grpo"), SINGLE, id="answers of one token: GSPO is GRPO"),
        pytest.param(loss_named("grpo_decoupled"), loss_named("grpo"), ON_POLICY, id="on-policy: decoupled is GRPO"),
        pytest.param(loss_named("grpo"), plain_is, MILD, id="within the clip: plain IS"),
        pytest.param(loss_named("m2po", m2_limit=100.0), plain_is, STALE, id="nobody masked: plain IS"),
        pytest.param(lambda t, n, lam: spo(t, n, lam, clip=1e9), plain_is, STALE, id="SPO, large ε: plain IS"),
        pytest.param(
            loss_named("truncated_is", weight_cap=3.0),
            lambda t, n, lam: cispo(t, n, lam, clip_low=1.0, clip_high=2.0),
            {"w": W},
            id="CISPO without a lower clip: truncated IS",
        ),
    ],
)
def test_limits_coincide_in_loss_and_gradient(first, second, tokens):
    arguments = {"u": U, "advantage": ADVANTAGE, "sequence": SEQUENCE} | tokens
    one, two = make_tokens(**arguments), make_tokens(**arguments)
    loss, other = first(one, 6.0, 0.5), second(two, 6.0, 0.5)
    assert loss.item() == pytest.approx(other.item(), rel=1e-7)
    torch.testing.assert_close(gain_gradient(loss, one), gain_gradient(other, two), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("loss", "tokens"),
    [
        pytest.param(lambda t: loss_named("truncated_is")(t, 6.0, 0.0), STALE | {"u": [1.0] * 6}, id="below the cap"),
        pytest.param(lambda t: sapo(t, 6.0, 0.0, tau_positive=1e-5, tau_negative=1e-5), STALE, id="SAPO, small τ"),
    ],
)
def test_limits_coincide_in_the_gradient(loss, tokens):
    arguments = {"u": U, "advantage": ADVANTAGE} | tokens
    one, two = make_tokens(**arguments), make_tokens(**arguments)
    torch.testing.assert_close(
        gain_gradient(loss(one), one), gain_gradient(plain_is(two, 6.0, 0.0), two), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("name", OVER_TRAJECTORIES)
def test_for_answers_of_one_length_the_mean_over_trajectories_is_that_over_tokens(name):
    arguments = {"w": W, "advantage": ADVANTAGE, "sequence": [0, 0, 1, 1, 2, 2]}
    one, two = make_tokens(U, **arguments), make_tokens(U, **arguments)
    loss, other = OVER_TRAJECTORIES[name](one, 3.0, 0.5), ALL[name](two, 6.0, 0.5)
    assert loss.item() == pytest.approx(other.item())
    torch.testing.assert_close(gain_gradient(loss, one), gain_gradient(other, two))


def test_beyond_the_limit_of_log_ratios_a_clip_still_silences_and_a_penalty_still_pulls():
    far = make_tokens([1.0, 1.0], dtype=torch.float32)
    far = replace(far, logp_N=(far.logp_prox_N + 50).requires_grad_())
    assert gain_gradient(grpo(far, 1, 0.0, clip_low=0.2, clip_high=0.2), far).tolist() == [0.0, 0.0]
    assert (gain_gradient(spo(far, 1, 0.0, clip=0.2), far) < -1e8).all()
