"""The shape of an objective: how much a token counts, by how far its ratio has moved."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from r2vpo.algorithm.objectives import Objective
from r2vpo.algorithm.tokens import TokenBatch


def gradient_weight(objective: Objective, ratio: Sequence[float], advantage: float, *, lam: float = 1.0) -> list[float]:
    """d(-loss)/d(logp) of one token, for each of K ratios (positive), at a denominator of 1: ``[K]``, by autograd.

    Each token is a trajectory, sampled by the proximal policy: u = ρ and w = 1. ``lam`` is λ. The K tokens are one
    minibatch, which matters to `m2po` alone.
    """
    log_ratio_N = torch.tensor(ratio, dtype=torch.float64).log()
    zero_N = torch.zeros_like(log_ratio_N)
    tokens = TokenBatch(
        logp_N=log_ratio_N.requires_grad_(),
        logp_prox_N=zero_N,
        behavior_logp_N=zero_N,
        advantage_N=zero_N + advantage,
        sequence_N=torch.arange(len(ratio)),
    )
    return (-torch.autograd.grad(objective(tokens, 1.0, lam), tokens.logp_N)[0]).tolist()
