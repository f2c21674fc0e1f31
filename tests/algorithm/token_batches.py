"""Tokens by their ratios, and every objective by its name."""

from __future__ import annotations

import torch

from r2vpo.algorithm.config import BRAKES, OBJECTIVES, AlgorithmConfig
from r2vpo.algorithm.objectives import objective
from r2vpo.algorithm.tokens import TokenBatch

GATED = {
    f"{name}_{brake}": objective(AlgorithmConfig(name=name, brake=brake))
    for name in ("r2vpo", "r2vpo_sequence")
    for brake in BRAKES
    if brake != "everywhere"
}
"""R²VPO with every brake that has a gate."""

ALL = {name: objective(AlgorithmConfig(name=name, brake="everywhere")) for name in OBJECTIVES} | GATED
"""The objectives with default settings but for the brake, as a sum over tokens."""

OVER_TRAJECTORIES = {
    name: objective(AlgorithmConfig(name=name, loss_mean="sequence", brake="everywhere")) for name in OBJECTIVES
}
"""The same as a sum over trajectories of their token means."""


def make_tokens(u, *, w=1.0, advantage=1.0, draw_weight=None, sequence=None, keep=None, dtype=torch.float64):
    """Tokens with the given update ratios, uncapped reweightings, advantages and weights; ``logp_N`` is a leaf.

    ``sequence`` says which trajectory each belongs to; every token is one of its own by default.
    """
    u_N = torch.tensor(u, dtype=dtype)
    logp_prox_N = torch.full_like(u_N, -1.5)
    return TokenBatch(
        logp_N=(logp_prox_N + u_N.log()).requires_grad_(),
        logp_prox_N=logp_prox_N,
        behavior_logp_N=logp_prox_N - torch.as_tensor(w, dtype=dtype).expand_as(u_N).log(),
        advantage_N=torch.as_tensor(advantage, dtype=dtype).expand_as(u_N).clone(),
        draw_weight_N=None if draw_weight is None else torch.as_tensor(draw_weight, dtype=dtype).expand_as(u_N).clone(),
        sequence_N=torch.arange(len(u)) if sequence is None else torch.tensor(sequence, dtype=torch.long),
        keep_N=None if keep is None else torch.tensor(keep),
    )


def gain_gradient(loss, tokens):
    """d(-loss)/d(logp), the gradient weights."""
    return -torch.autograd.grad(loss, tokens.logp_N)[0]


def values(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)
