"""M2PO: importance sampling from which a mask over the whole minibatch takes the tokens that strayed furthest.

The mask is a statistic of all tokens of a minibatch, so it does not add up over micro-batches as a loss does: whoever
splits a minibatch must first compute the mask of all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2vpo.algorithm.tokens import TokenBatch, log_ratio, loss, ratio


@torch.no_grad()
def m2po_mask(log_ratio_N: Tensor, advantage_N: Tensor, limit: float) -> Tensor:
    """The tokens of a minibatch that train, bool ``[N]``.

    ``log_ratio_N`` is log ρ (nats). Only tokens that moved where their advantage pushes them, A·log ρ > 0, may be
    masked, as with a clip. Of these, the ones of largest (log ρ)² are masked, one by one, until the mean of (log ρ)²
    over those that remain is at most ``limit`` (nats²; 0.04 in the paper).

    >>> log_ratio_N, advantage_N = torch.tensor([0.1, 0.3, 0.5, -0.9]), torch.ones(4)
    >>> m2po_mask(log_ratio_N, advantage_N, 0.05)  # (0.01 + 0.09 + 0.25)/3 = 0.117, (0.01 + 0.09)/2 = 0.05
    tensor([ True,  True, False,  True])

    Source: arXiv 2510.01161; the choice of tokens that may be masked is our reading of it.
    """
    moment_N = log_ratio_N.double().square()
    candidates = torch.nonzero(advantage_N * log_ratio_N > 0).flatten()
    order = candidates[moment_N[candidates].argsort(stable=True)]
    count = torch.arange(1, len(order) + 1, dtype=torch.float64, device=order.device)
    # Running means of an ascending sequence ascend, so those within the limit are a prefix. The allowance is the
    # rounding of float32 log-ratios: tokens that are all exactly at the limit are within it.
    within = moment_N[order].cumsum(0) / count <= limit * (1 + 1e-6)
    keep_N = torch.ones_like(log_ratio_N, dtype=torch.bool)
    keep_N[order[~within]] = False
    return keep_N


def m2po(tokens: TokenBatch, denominator: float, lam: float, *, limit: float) -> Tensor:
    """Masked importance sampling: gain ``m·ρ·A``; weight ``m·ρ·A``. A scalar; ``lam`` is not used.

    m is ``tokens.keep_N``; where that is None the tokens given are a whole minibatch, and m is `m2po_mask` of them.
    Masked tokens count in the denominator.

    Source: arXiv 2510.01161.
    """
    keep_N = tokens.keep_N
    if keep_N is None:
        keep_N = m2po_mask(log_ratio(tokens), tokens.advantage_N, limit)
    return loss(tokens, keep_N * ratio(tokens) * tokens.advantage_N, denominator)
