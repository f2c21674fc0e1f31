"""Group-relative advantages: a trajectory is judged against the other answers to the same prompt."""

from __future__ import annotations

import numpy as np

_ROUNDING = 1e-9
"""Rewards closer to each other than this, relative to the largest, are equal."""


def group_advantages(rewards_G: np.ndarray, *, mode: str) -> np.ndarray:
    """Advantages ``[G]`` (float64) of the members of one group.

    ``rewards_G`` is float64 ``[G]``, NaN where a member has no verdict. Such members get 0 and enter neither mean nor
    deviation. With fewer than two verdicts, or verdicts that are all equal, there is nothing to compare and all get 0.

    ``mode`` is ``"mean"``, A = r - mean(r), or ``"mean_std"``, A = (r - mean(r)) / std(r). The deviation is that of
    the population (divided by n, not n - 1): the verdicts *are* the population the baseline is taken from, and the
    mean of A² is then 1 in every group, however many members lost their verdict.

    >>> group_advantages(np.array([1.0, 0.0, 0.0, 1.0, np.nan]), mode="mean_std")
    array([ 1., -1., -1.,  1.,  0.])
    """
    if mode not in ("mean", "mean_std"):
        raise ValueError(f"advantage mode={mode} is not one of mean, mean_std")
    advantage_G = np.zeros(len(rewards_G))
    has_verdict_G = ~np.isnan(rewards_G)
    verdicts = rewards_G[has_verdict_G]
    # The spread, not the deviation: the latter of three equal 0.1 is 1.4e-17 and would blow rounding up to ±1.
    if len(verdicts) < 2 or np.ptp(verdicts) <= _ROUNDING * np.abs(verdicts).max():
        return advantage_G
    scale = verdicts.std() if mode == "mean_std" else 1.0
    advantage_G[has_verdict_G] = (verdicts - verdicts.mean()) / scale
    return advantage_G
