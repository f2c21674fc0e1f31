"""The objectives: pure functions from per-token log-probs to a scalar loss. Read this file first, then `tokens.py`.

    maximise E[w·u·A]  subject to  V = E[(u - 1)²] ≤ δ

is this project's; `rivals.py` and `m2po.py` hold the others. The legend is that of `r2vpo.algorithm.tokens`, and

    V = (1/N) Σ c·(u - 1)²                        second moment, which the budget δ bounds; λ is its multiplier

Every loss is a sum over the tokens given divided by ``denominator``, which counts the whole minibatch, not the
micro-batch: the losses of micro-batches and ranks add up to the loss of the minibatch. Each token's share of loss and V
is multiplied by c, and the denominators are not: the expectation of both over the draws is that of uniform draws.

See docs/loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.m2po import m2po
from r2vpo.algorithm.rivals import cispo, grpo, grpo_decoupled, gspo, plain_is, sapo, spo, truncated_is
from r2vpo.algorithm.tokens import (
    TokenBatch,
    excess,
    loss,
    per_trajectory,
    reweighting,
    sequence_reweighting,
    trajectory_mean,
    update_excess,
    weighted,
)
from r2vpo.records import Trajectory

_MEASURED_LIMIT = 100.0
"""Log-ratios (nats) are measured up to this magnitude: exp(200) is far inside float64."""

Objective = Callable[[TokenBatch, float, float], Tensor]
"""``(tokens, denominator, lam) -> loss``; what `objective` returns."""


def needs_proximal(trajectory: Trajectory, step: int) -> bool:
    """Whether learner step ``step`` must compute ``logp_prox`` of this trajectory before its first optimiser step.

    True if any trained token has a lag above 0; then all tokens of the trajectory get computed values. Where every
    token was sampled by the current version, the behaviour policy *is* the proximal policy: the behaviour log-probs
    serve as ``logp_prox``, w is 1 and u is ρ.
    """
    return trajectory.num_trained_tokens > 0 and trajectory.oldest_version < step


def r2vpo(tokens: TokenBatch, denominator: float, lam: float | Tensor, *, brake: str, weight_cap: float) -> Tensor:
    """Ratio-variance regularised loss, decoupled: ``-(1/denominator) Σ c·(w·u·A - λ·g·(u - 1)²)``, a scalar.

    The gradient weight of a token, d(-loss)/d(logp)·denominator, is ``c·u·(w·A - 2·λ·g·(u - 1))``: a soft brake that
    is zero at u* = 1 + w·A / (2·λ). The gate g, a constant, is 1[A·(u - 1) > 0]: like a clip it brakes only tokens
    that move where their advantage pushes them. ``brake`` says what happens beyond u*:

    - ``asymmetric``: a token that has risen (A > 0) is let go: its gain keeps the value that it has at u*, its
      largest, and it has no gradient. One that has fallen is pulled back: its penalty grows on. Upwards that pull
      would grow like u², downwards it is λ/2 at most;
    - ``saturating``: both are let go;
    - ``gated``: both are pulled back;
    - ``everywhere``: the same, with g = 1 for all tokens.

    Source: the Lagrangian of max E[w·u·A] subject to E[(u - 1)²] ≤ δ, after arXiv 2601.03320 (estimators are our own).
    """
    gain_N = _braked(tokens, update_excess(tokens), reweighting(tokens, weight_cap), lam, brake)
    return loss(tokens, gain_N, denominator)


def r2vpo_sequence(
    tokens: TokenBatch, denominator: float, lam: float | Tensor, *, brake: str, weight_cap: float
) -> Tensor:
    """`r2vpo` on length-normalised sequence ratios: u and w are exp of the mean log-ratio over the trajectory.

    Every token has the gain of its trajectory, and the gradient spreads evenly over them: the gradient weight is that
    of `r2vpo` with these u and w. V stays the one over tokens. By Jensen's inequality a mean log-ratio has at most the
    mean square of the log-ratios, so a budget on tokens also holds their trajectories, and δ keeps its meaning.

    Source: as `r2vpo`, on the ratio of GSPO, arXiv 2507.18071.
    """
    excess_N = excess(trajectory_mean(tokens, tokens.logp_N - tokens.logp_prox_N.detach()))
    gain_N = _braked(tokens, excess_N, sequence_reweighting(tokens, weight_cap), lam, brake)
    return loss(tokens, gain_N, denominator)


def second_moment_sum(tokens: TokenBatch) -> Tensor:
    """``Σ c·(u - 1)²``, a detached float64 scalar; over all micro-batches and ranks, divided by N, it is V.

    Exact for log-ratios up to ±100 and finite for every finite log-prob.
    """
    log_u_N = (tokens.logp_N.detach() - tokens.logp_prox_N.detach()).double()
    return weighted(tokens, torch.expm1(log_u_N.clamp(-_MEASURED_LIMIT, _MEASURED_LIMIT)).square()).sum()


def objective(config: AlgorithmConfig) -> Objective:
    """The loss that ``config.name`` and ``config.loss_mean`` ask for, as ``(tokens, denominator, lam) -> loss``.

    ``denominator`` is `loss_denominator` of the whole minibatch. Objectives without a penalty ignore ``lam``.
    """
    base = _objective(config)
    if config.loss_mean != "sequence":
        return base
    return lambda tokens, denominator, lam: base(per_trajectory(tokens), denominator, lam)


def loss_denominator(config: AlgorithmConfig, num_tokens: int, num_trajectories: int) -> float:
    """What the loss of a minibatch is divided by, given its trained tokens and trajectories over all ranks.

    ``loss_mean`` ``token``: the tokens; ``sequence``: the trajectories (`objective` weights each token by 1/|o|);
    ``constant``: the trajectories times ``loss_length``, as in Dr.GRPO, arXiv 2503.20783.
    """
    match config.loss_mean:
        case "token":
            return float(num_tokens)
        case "sequence":
            return float(num_trajectories)
        case _:
            assert config.loss_length is not None, "AlgorithmConfig let a constant mean without loss_length through"
            return float(num_trajectories * config.loss_length)


def _objective(config: AlgorithmConfig) -> Objective:
    """The objective with its settings, for a plain sum over tokens."""
    clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}
    cap, brake = {"weight_cap": config.weight_cap}, config.brake
    named: dict[str, Objective] = {
        "r2vpo": partial(r2vpo, brake=brake, **cap),
        "r2vpo_sequence": partial(r2vpo_sequence, brake=brake, **cap),
        "grpo": partial(grpo, **clip),
        "grpo_decoupled": partial(grpo_decoupled, **clip, **cap),
        "gspo": partial(gspo, **clip),
        "cispo": partial(cispo, **clip),
        "spo": partial(spo, clip=config.clip_high),
        "sapo": partial(sapo, tau_positive=config.tau_positive, tau_negative=config.tau_negative),
        "m2po": partial(m2po, limit=config.m2_limit),
        "truncated_is": partial(truncated_is, **cap),
        "plain_is": plain_is,
    }
    return named[config.name]


def _braked(tokens: TokenBatch, excess_N: Tensor, weight_N: Tensor, lam: float | Tensor, brake: str) -> Tensor:
    """``w·(1 + x)·A - λ·g·x²`` for x = u - 1, where tokens are let go for x no farther than its maximum."""
    push_N = weight_N * tokens.advantage_N
    if brake == "everywhere":
        return push_N * (1 + excess_N) - lam * excess_N.square()
    x_N = excess_N.detach()
    runs_away_N = tokens.advantage_N * x_N > 0
    if brake != "gated":
        is_let_go_N = runs_away_N & (2 * lam * x_N.abs() > push_N.abs())
        if brake == "asymmetric":
            is_let_go_N &= x_N > 0
        excess_N = torch.where(is_let_go_N, push_N / (2 * lam), excess_N)
    return push_N * (1 + excess_N) - lam * runs_away_N * excess_N.square()
