"""What every objective is made of: the tokens it sees, their ratios, and the sum that is its loss.

Legend: every tensor is ``[N]``, the N trained tokens of one micro-batch, flat; its trajectories are whole.

    u = exp(logp - logp_prox)                     update ratio: how far this learner step has moved the policy
    w = min(exp(logp_prox - behavior_logp), cap)  reweighting of stale tokens, a constant bounded by `weight_cap`
    ρ = exp(logp - behavior_logp)                 ratio; u·w where the bound does not bite
    s = exp(mean over a trajectory of log ρ)      length-normalised sequence ratio, the same for all its tokens
    A                                             advantage of the token's trajectory
    c                                             importance weight of the draw of the token's group, 1 unless stale
                                                  groups are drawn with unequal chances
    |o|                                           trained tokens of the token's trajectory

**Heavy tails.** float32 overflows at (u - 1)² for log-ratios above 44, so inside the losses a log-ratio is replaced
by its value clamped to ±`LOG_RATIO_LIMIT` *with the identity as its gradient*. A token beyond the limit gets the
gradient of a token at the limit, so it is still pulled back. A plain clamp would have gradient zero there and release
exactly the tokens that have run away furthest. The limit (ratios from 1/22026 to 22026) leaves room for the square of a
gradient norm in float32. The second moment that is measured and logged is not limited so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 10.0
"""Log-ratios (nats) enter a loss with at most this magnitude."""


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
    sequence_N: Tensor | None = None
    """int64: index (below N) of the token's trajectory in this micro-batch, which holds all trained tokens of it.

    Needed by objectives on sequence ratios and by means over trajectories."""
    keep_N: Tensor | None = None
    """bool: the tokens that `m2po` trains, as `m2po_mask` found them in the whole minibatch."""

    def __post_init__(self) -> None:
        shapes = [t.shape for t in vars(self).values() if t is not None]
        assert all(s == shapes[0] and len(s) == 1 for s in shapes), f"tensors of a TokenBatch must share [N]: {shapes}"


def reweighting(tokens: TokenBatch, weight_cap: float) -> Tensor:
    """w ``[N]``: ``min(exp(logp_prox - behavior_logp), weight_cap)``, detached; capped before exp, so never inf."""
    return _capped_exp(tokens.logp_prox_N - tokens.behavior_logp_N, weight_cap)


def sequence_reweighting(tokens: TokenBatch, weight_cap: float) -> Tensor:
    """w ``[N]`` of the length-normalised sequence: of the mean log-ratio of a trajectory, capped after the mean."""
    return _capped_exp(trajectory_mean(tokens, tokens.logp_prox_N - tokens.behavior_logp_N), weight_cap)


def update_excess(tokens: TokenBatch) -> Tensor:
    """u - 1 ``[N]``, with a gradient."""
    return excess(tokens.logp_N - tokens.logp_prox_N.detach())


def ratio(tokens: TokenBatch) -> Tensor:
    """ρ ``[N]``, with a gradient."""
    return 1 + excess(log_ratio(tokens))


def log_ratio(tokens: TokenBatch) -> Tensor:
    """log ρ ``[N]`` (nats), with a gradient."""
    return tokens.logp_N - tokens.behavior_logp_N.detach()


def excess(log_ratio_N: Tensor) -> Tensor:
    """exp(x) - 1 of the limited log-ratio (module docstring); by expm1, because near 0 the subtraction would cancel."""
    limited_N = log_ratio_N.detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return torch.expm1(log_ratio_N + (limited_N - log_ratio_N.detach()))


def trajectory_mean(tokens: TokenBatch, value_N: Tensor) -> Tensor:
    """The mean of ``value_N`` over each token's trajectory, ``[N]``, with the gradient of a mean."""
    sequence_N = _sequences(tokens)
    sum_N = torch.zeros_like(value_N).index_add(0, sequence_N, value_N)
    return sum_N[sequence_N] / _lengths(tokens)


def per_trajectory(tokens: TokenBatch) -> TokenBatch:
    """The same tokens, each weighted by 1/|o|: a sum over them is a sum over trajectories of their token means."""
    weight_N = 1 / _lengths(tokens)
    return replace(tokens, draw_weight_N=weighted(tokens, weight_N))


def loss(tokens: TokenBatch, gain_N: Tensor, denominator: float) -> Tensor:
    """``-(1/denominator) Σ c·gain``, a scalar: how every objective ends."""
    assert denominator > 0, "a minibatch without trained tokens has no loss; skip its optimiser step"
    return -weighted(tokens, gain_N).sum() / denominator


def weighted(tokens: TokenBatch, term_N: Tensor) -> Tensor:
    """``c·term`` ``[N]``."""
    return term_N if tokens.draw_weight_N is None else tokens.draw_weight_N * term_N


def _capped_exp(log_weight_N: Tensor, cap: float) -> Tensor:
    return log_weight_N.detach().clamp(max=log(cap)).exp()


def _lengths(tokens: TokenBatch) -> Tensor:
    """|o| ``[N]``, in the type of the log-probs."""
    sequence_N, one_N = _sequences(tokens), torch.ones_like(tokens.advantage_N)
    return torch.zeros_like(one_N).index_add(0, sequence_N, one_N)[sequence_N]


def _sequences(tokens: TokenBatch) -> Tensor:
    assert tokens.sequence_N is not None, "this objective or mean needs TokenBatch.sequence_N"
    return tokens.sequence_N
