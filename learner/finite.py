"""Numbers that are not finite, on their way from the store to the weights.

    behaviour log-prob, proximal log-prob, log-prob, advantage ──▶ loss ──▶ gradient ──▶ weights

An optimiser step whose loss or gradient is not finite is discarded: nothing moves. Which of the quantities before them
was the first to be broken is counted beside the loss, so that the log can name it. Weights that are not finite are the
end: they are neither published nor saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from r2vpo.algorithm.tokens import TokenBatch

CAUSES = ("behaviour log-prob", "proximal log-prob", "log-prob", "advantage")
"""What `count_not_finite` counts, in its order; each may be the cause of those after it but for the last."""


def count_not_finite(tokens: TokenBatch) -> Tensor:
    """float64 ``[4]``: how many tokens have a number that is not finite, for each of `CAUSES`."""
    values = (tokens.behavior_logp_N, tokens.logp_prox_N, tokens.logp_N, tokens.advantage_N)
    return torch.stack([(~value_N.detach().isfinite()).sum() for value_N in values]).double()


def first_cause(not_finite: Sequence[float], loss: float) -> str:
    """Why an optimiser step was discarded, given the counts of `count_not_finite` over all ranks and the loss.

    >>> first_cause([0, 0, 3, 0], float("nan"))
    'log-prob of 3 tokens'
    >>> first_cause([0, 0, 0, 0], 0.5)
    'gradient'
    """
    for cause, count in zip(CAUSES, not_finite, strict=True):
        if count:
            return f"{cause} of {count:.0f} token{'' if count == 1 else 's'}"
    return "gradient" if isfinite(loss) else "loss"
