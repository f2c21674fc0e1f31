"""The objectives: pure functions from per-token log-probs to a scalar loss. Read this file first.

Legend: every tensor is ``[N]``, the N trained tokens of one micro-batch, flat.

    u = exp(logp - logp_prox)                     update ratio: how far this learner step has moved the policy
    w = min(exp(logp_prox - behavior_logp), cap)  reweighting of stale tokens, a constant bounded by `weight_cap`
    ρ = exp(logp - behavior_logp)                 ratio; u·w where the bound does not bite
    A                                             group-relative advantage of the token's trajectory
    c                                             importance weight of the draw of the token's group, 1 unless stale
                                                  groups are drawn with unequal chances
    V = mean c·(u - 1)²                           second moment, which the budget δ bounds

Every loss is a sum over the tokens given divided by ``num_tokens``, the global count of trained tokens of the whole
minibatch: the losses of micro-batches and ranks add up to the loss of the minibatch. Each token's share of loss and V
is multiplied by c, and the count is not: the expectation of both over the draws is that of uniform draws.

**Heavy tails.** float32 overflows at (u - 1)² for log-ratios above 44, so inside the losses a log-ratio is replaced
by its value clamped to ±`LOG_RATIO_LIMIT` *with the identity as its gradient*. A token beyond the limit gets the
gradient of a token at the limit, so it is still pulled back. A plain clamp would have gradient zero there and release
exactly the tokens that have run away furthest. The limit (ratios from 1/22026 to 22026) leaves room for the square of a
gradient norm in float32. The second moment that is measured and logged is not limited so.

See docs/loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.records import Trajectory

LOG_RATIO_LIMIT = 10.0
"""Log-ratios (nats) enter a loss with at most this magnitude."""

_MEASURED_LIMIT = 100.0
"""Log-ratios (nats) are measured up to this magnitude: exp(200) is far inside float64."""


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """What an objective sees of N trained tokens. Tensors ``[N]`` of one floating type, log-probs in nats."""

    logp_N: Tensor
    """Log-prob of the token under the weights being trained; the only tensor that carries a gradient."""
    logp_prox_N: Tensor
    """Log-prob under the proximal policy; the behaviour log-prob where `needs_proximal` says no."""
    behavior_logp_N: Tensor
    """Log-prob under which the token was sampled."""
    advantage_N: Tensor
    """Advantage of the token's trajectory."""
    draw_weight_N: Tensor | None = None
    """Importance weight c of the draw of the token's group; None where all are 1."""

    def __post_init__(self) -> None:
        tensors = (self.logp_N, self.logp_prox_N, self.behavior_logp_N, self.advantage_N, self.draw_weight_N)
        shapes = [t.shape for t in tensors if t is not None]
        assert all(s == shapes[0] and len(s) == 1 for s in shapes), f"tensors of a TokenBatch must share [N]: {shapes}"


Objective = Callable[[TokenBatch, float, float], Tensor]
"""``(tokens, num_tokens, lam) -> loss``; what `objective` returns."""


def needs_proximal(trajectory: Trajectory, step: int) -> bool:
    """Whether learner step ``step`` must compute ``logp_prox`` of this trajectory before its first optimiser step.

    True if any trained token has a lag above 0; then all tokens of the trajectory get computed values. Where every
    token was sampled by the current version, the behaviour policy *is* the proximal policy: the behaviour log-probs
    serve as ``logp_prox``, w is 1 and u is ρ.
    """
    return trajectory.num_trained_tokens > 0 and trajectory.oldest_version < step


def r2vpo(tokens: TokenBatch, *, num_tokens: float, lam: float, gated: bool, weight_cap: float) -> Tensor:
    """Ratio-variance regularised loss, decoupled: ``-(1/num_tokens) Σ c·(w·u·A - λ·g·(u - 1)²)``, a scalar.

    The gradient weight of a token, d(-loss)/d(logp)·num_tokens, is ``c·u·(w·A - 2·λ·g·(u - 1))``: a soft brake that
    is zero at u* = 1 + w·A / (2·λ) and pulls back beyond it. The gate g, a constant, is 1, or with ``gated``
    1[A·(u - 1) > 0]: like a clip it brakes only tokens that move where their advantage pushes them.

    Source: the Lagrangian of max E[w·u·A] subject to E[(u - 1)²] ≤ δ, after arXiv 2601.03320 (estimators are our own).
    """
    excess_N = _update_excess(tokens)
    weighted_advantage_N = reweighting(tokens, weight_cap) * tokens.advantage_N
    penalty_N = excess_N.square()
    if gated:
        penalty_N = penalty_N * (tokens.advantage_N * excess_N.detach() > 0)
    return _loss(tokens, weighted_advantage_N * (1 + excess_N) - lam * penalty_N, num_tokens)


def grpo_clip(tokens: TokenBatch, *, num_tokens: float, clip_low: float, clip_high: float) -> Tensor:
    """Clipped loss on the plain ratio: ``-(1/num_tokens) Σ c·min(ρ·A, clip(ρ, 1 - low, 1 + high)·A)``, a scalar.

    Source: GRPO, arXiv 2402.03300, with the token mean over the whole minibatch and without a KL term.
    """
    ratio_N = 1 + torch.expm1(_limited(tokens.logp_N - tokens.behavior_logp_N.detach()))
    return _loss(tokens, _clipped(ratio_N, tokens.advantage_N, clip_low, clip_high), num_tokens)


def grpo_decoupled(
    tokens: TokenBatch, *, num_tokens: float, clip_low: float, clip_high: float, weight_cap: float
) -> Tensor:
    """Clipped loss on the update ratio: ``-(1/num_tokens) Σ c·w·min(u·A, clip(u, 1 - low, 1 + high)·A)``, a scalar.

    Source: decoupled PPO, arXiv 2110.00641, with w bounded by ``weight_cap``.
    """
    clipped_N = _clipped(1 + _update_excess(tokens), tokens.advantage_N, clip_low, clip_high)
    return _loss(tokens, reweighting(tokens, weight_cap) * clipped_N, num_tokens)


def second_moment_sum(tokens: TokenBatch) -> Tensor:
    """``Σ c·(u - 1)²``, a detached float64 scalar; over all micro-batches and ranks, divided by N, it is V.

    Exact for log-ratios up to ±100 and finite for every finite log-prob.
    """
    log_u_N = (tokens.logp_N.detach() - tokens.logp_prox_N.detach()).double()
    return _weighted(tokens, torch.expm1(log_u_N.clamp(-_MEASURED_LIMIT, _MEASURED_LIMIT)).square()).sum()


def objective(config: AlgorithmConfig, *, gated: bool) -> Objective:
    """The loss that ``config.name`` asks for, as a function ``(tokens, num_tokens, lam) -> loss``.

    ``gated`` is ``config.is_gated(off_policy=...)``. The clipped objectives ignore it and ``lam``.
    """
    match config.name:
        case "r2vpo":
            return lambda tokens, num_tokens, lam: r2vpo(
                tokens, num_tokens=num_tokens, lam=lam, gated=gated, weight_cap=config.weight_cap
            )
        case "grpo":
            return lambda tokens, num_tokens, lam: grpo_clip(
                tokens, num_tokens=num_tokens, clip_low=config.clip_low, clip_high=config.clip_high
            )
        case "grpo_decoupled":
            return lambda tokens, num_tokens, lam: grpo_decoupled(
                tokens,
                num_tokens=num_tokens,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                weight_cap=config.weight_cap,
            )
        case _:
            raise AssertionError(f"AlgorithmConfig let algorithm.name={config.name} through")


def reweighting(tokens: TokenBatch, weight_cap: float) -> Tensor:
    """w ``[N]``: ``min(exp(logp_prox - behavior_logp), weight_cap)``, detached; capped before exp, so never inf."""
    log_w_N = tokens.logp_prox_N.detach() - tokens.behavior_logp_N.detach()
    return log_w_N.clamp(max=log(weight_cap)).exp()


def _update_excess(tokens: TokenBatch) -> Tensor:
    """u - 1 ``[N]``, with a gradient; by expm1, because near u = 1 the subtraction would cancel."""
    return torch.expm1(_limited(tokens.logp_N - tokens.logp_prox_N.detach()))


def _limited(log_ratio_N: Tensor) -> Tensor:
    """The value clamped to ±`LOG_RATIO_LIMIT`, with the identity as gradient (the module docstring says why)."""
    return log_ratio_N + (log_ratio_N.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT) - log_ratio_N).detach()


def _clipped(ratio_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``min(r·A, clip(r, 1 - low, 1 + high)·A)``: no gradient where a token moved past the clip in A's direction."""
    return torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N)


def _loss(tokens: TokenBatch, gain_N: Tensor, num_tokens: float) -> Tensor:
    assert num_tokens > 0, "a minibatch without trained tokens has no loss; skip its optimiser step"
    return -_weighted(tokens, gain_N).sum() / num_tokens


def _weighted(tokens: TokenBatch, term_N: Tensor) -> Tensor:
    """``c·term``."""
    return term_N if tokens.draw_weight_N is None else tokens.draw_weight_N * term_N
