"""The objectives that R²VPO is compared with: one function each, all of one signature.

Each takes ``(tokens, denominator, lam)`` and its settings, and returns ``-(1/denominator) Σ c·gain``, a scalar (the
legend is that of `r2vpo.algorithm.tokens`); ``lam`` is not used. "Weight" is the gradient weight of a token,
d(-loss)/d(logp)·denominator at c = 1. At lag 0 and u = 1 it is A for every one of them: plain policy gradient.

What the papers add around their objective (KL terms, entropy bonuses, filters of prompts) is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2vpo.algorithm.tokens import (
    TokenBatch,
    excess,
    log_ratio,
    loss,
    ratio,
    reweighting,
    trajectory_mean,
    update_excess,
)


def plain_is(tokens: TokenBatch, denominator: float, lam: float) -> Tensor:
    """Importance sampling without any bound: gain ``ρ·A``; weight ``ρ·A``.

    Source: the off-policy policy gradient with one ratio per token, as in PPO without its clip, arXiv 1707.06347.
    """
    return loss(tokens, ratio(tokens) * tokens.advantage_N, denominator)


def truncated_is(tokens: TokenBatch, denominator: float, lam: float, *, weight_cap: float) -> Tensor:
    """Truncated importance sampling: gain ``sg(min(ρ, cap))·A·logp``; weight ``min(ρ, cap)·A``.

    ``sg`` stops the gradient, so that a token beyond the cap keeps the gradient of a token at the cap.

    Source: Ionides, Truncated Importance Sampling (2008), in the policy gradient as in IMPALA, arXiv 1802.01561.
    """
    weight_N = ratio(tokens).detach().clamp(max=weight_cap)
    return loss(tokens, weight_N * tokens.advantage_N * tokens.logp_N, denominator)


def cispo(tokens: TokenBatch, denominator: float, lam: float, *, clip_low: float, clip_high: float) -> Tensor:
    """CISPO: gain ``sg(clip(ρ, 1 - low, 1 + high))·A·logp``; weight ``clip(ρ, 1 - low, 1 + high)·A``.

    No token is silenced; its weight is clipped. The paper leaves the lower side open: ``clip_low`` = 1.

    Source: arXiv 2506.13585, equations 4 and 5.
    """
    weight_N = ratio(tokens).detach().clamp(1 - clip_low, 1 + clip_high)
    return loss(tokens, weight_N * tokens.advantage_N * tokens.logp_N, denominator)


def grpo(tokens: TokenBatch, denominator: float, lam: float, *, clip_low: float, clip_high: float) -> Tensor:
    """Clip on the plain ratio: gain ``min(ρ·A, clip(ρ, 1 - low, 1 + high)·A)``; weight ``ρ·A``, 0 past the clip.

    Source: GRPO, arXiv 2402.03300; with high > low clip-higher, DAPO, arXiv 2503.14476.
    """
    return loss(tokens, _clipped(ratio(tokens), tokens.advantage_N, clip_low, clip_high), denominator)


def grpo_decoupled(
    tokens: TokenBatch, denominator: float, lam: float, *, clip_low: float, clip_high: float, weight_cap: float
) -> Tensor:
    """Clip on the update ratio: gain ``w·min(u·A, clip(u, 1 - low, 1 + high)·A)``; weight ``w·u·A``, 0 past the clip.

    Source: decoupled PPO, arXiv 2110.00641, with a bounded w as in arXiv 2505.24298.
    """
    gain_N = _clipped(1 + update_excess(tokens), tokens.advantage_N, clip_low, clip_high)
    return loss(tokens, reweighting(tokens, weight_cap) * gain_N, denominator)


def gspo(tokens: TokenBatch, denominator: float, lam: float, *, clip_low: float, clip_high: float) -> Tensor:
    """Clip on the length-normalised sequence ratio s: gain ``min(s·A, clip(s, 1 - low, 1 + high)·A)`` of every token.

    Weight ``s·A``, 0 past the clip: the gradient of s spreads evenly over the tokens of its trajectory.

    Source: arXiv 2507.18071, equations 5 to 7; the paper's mean is that over trajectories.
    """
    sequence_ratio_N = 1 + excess(trajectory_mean(tokens, log_ratio(tokens)))
    return loss(tokens, _clipped(sequence_ratio_N, tokens.advantage_N, clip_low, clip_high), denominator)


def spo(tokens: TokenBatch, denominator: float, lam: float, *, clip: float) -> Tensor:
    """Simple Policy Optimization: gain ``ρ·A - |A|/(2·clip)·(ρ - 1)²``; weight ``ρ·(A - |A|·(ρ - 1)/clip)``.

    Zero at ρ = 1 ± clip on the side that A pushes to, and pulling back beyond: R²VPO whose λ is |A|/(2·clip).

    Source: arXiv 2401.16025, equation 12.
    """
    excess_N = excess(log_ratio(tokens))
    penalty_N = tokens.advantage_N.abs() / (2 * clip) * excess_N.square()
    return loss(tokens, tokens.advantage_N * (1 + excess_N) - penalty_N, denominator)


def sapo(tokens: TokenBatch, denominator: float, lam: float, *, tau_positive: float, tau_negative: float) -> Tensor:
    """Soft Adaptive Policy Optimization: gain ``σ(τ·(ρ - 1))·4/τ·A``; weight ``4·σ·(1 - σ)·ρ·A``.

    τ is ``tau_positive`` where A > 0, else ``tau_negative``: the weight decays on both sides of ρ = 1.

    Source: arXiv 2511.20347.
    """
    positive_N = tokens.advantage_N > 0
    tau_N = torch.where(positive_N, torch.full_like(tokens.advantage_N, tau_positive), tau_negative)
    gate_N = torch.sigmoid(tau_N * excess(log_ratio(tokens))) * 4 / tau_N
    return loss(tokens, gate_N * tokens.advantage_N, denominator)


def _clipped(ratio_N: Tensor, advantage_N: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """``min(r·A, clip(r, 1 - low, 1 + high)·A)``: no gradient where a token moved past the clip in A's direction."""
    return torch.minimum(ratio_N * advantage_N, ratio_N.clamp(1 - clip_low, 1 + clip_high) * advantage_N)
