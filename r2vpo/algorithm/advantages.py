"""Group-relative advantages: a trajectory is judged against the other answers to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r2vpo.algorithm.config import ADVANTAGES

_ROUNDING = 1e-9
"""Rewards closer to each other than this, relative to the largest, are equal."""


def batch_advantages(rewards: Sequence[np.ndarray], *, mode: str) -> list[np.ndarray]:
    """Advantages of all members of the groups of one learner step: float64 ``[G]`` for each group.

    ``rewards`` holds float64 ``[G]`` for each group, NaN where a member has no verdict. Such members get 0 and enter
    neither mean nor deviation. With fewer than two verdicts, or verdicts that are all equal, there is nothing to
    compare and all members of the group get 0.

    With the mean over the n verdicts r of a group, ``mode`` is

    - ``"mean"``: A = r - mean (Dr.GRPO, arXiv 2503.20783),
    - ``"mean_std"``: A = (r - mean) / std (GRPO, arXiv 2402.03300),
    - ``"leave_one_out"``: A = r - mean of the other verdicts = n/(n - 1)·(r - mean) (RLOO, arXiv 2402.14740),
    - ``"batch_whitened"``: A = (r - mean) / D, with D² the mean of (r - mean)² over all verdicts of the batch
      (REINFORCE++ with a group baseline, arXiv 2501.03262).

    Deviations are those of the population (divided by n, not n - 1): the verdicts *are* the population the baseline is
    taken from, and the mean of A² is then 1 in every group with a signal, or over the batch.

    >>> [a.tolist() for a in batch_advantages([np.array([1.0, 0.0, 0.0, 1.0, np.nan])], mode="mean_std")]
    [[1.0, -1.0, -1.0, 1.0, 0.0]]
    """
    if mode not in ADVANTAGES:
        raise ValueError(f"advantage mode={mode} is not one of {', '.join(ADVANTAGES)}")
    centered = [_centered(rewards_G) for rewards_G in rewards]
    if mode == "batch_whitened":
        return _whitened(rewards, centered)
    return [a_G * _factor(a_G, ~np.isnan(r_G), mode) for r_G, a_G in zip(rewards, centered, strict=True)]


def _centered(rewards_G: np.ndarray) -> np.ndarray:
    """r - mean(r) ``[G]``, 0 for members without a verdict and where there is nothing to compare."""
    advantage_G = np.zeros(len(rewards_G))
    has_verdict_G = ~np.isnan(rewards_G)
    verdicts = rewards_G[has_verdict_G]
    # The spread, not the deviation: the latter of three equal 0.1 is 1.4e-17 and would blow rounding up to ±1.
    if len(verdicts) >= 2 and np.ptp(verdicts) > _ROUNDING * np.abs(verdicts).max():
        advantage_G[has_verdict_G] = verdicts - verdicts.mean()
    return advantage_G


def _factor(advantage_G: np.ndarray, has_verdict_G: np.ndarray, mode: str) -> float:
    """What centred rewards are multiplied by."""
    if mode == "mean" or not advantage_G.any():
        return 1.0
    n = int(has_verdict_G.sum())
    return n / (n - 1) if mode == "leave_one_out" else 1 / np.sqrt((advantage_G**2).sum() / n)


def _whitened(rewards: Sequence[np.ndarray], centered: Sequence[np.ndarray]) -> list[np.ndarray]:
    num_verdicts = sum(int((~np.isnan(rewards_G)).sum()) for rewards_G in rewards)
    total = sum(float((a_G**2).sum()) for a_G in centered)
    scale = np.sqrt(total / num_verdicts) if total > 0 else 1.0
    return [a_G / scale for a_G in centered]
