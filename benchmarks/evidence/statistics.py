"""What is said about a set of runs: rollouts to a target, and a mean over seeds with its interval.

Interquartile mean and bootstrap over runs, as arXiv 2108.13264 advises; both are scipy's.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan
from typing import Any

import numpy as np
from scipy import stats

WINDOW = 6
"""Iterations (× 256 rollouts) over which the sampled accuracy is averaged before it is compared with a target."""
RESAMPLES = 5_000
GAIN = 0.9
"""The target accuracy: this share of what the best clip gains on-policy in all of its rollouts."""
LAST = 10
"""Iterations at the end of a run that its last accuracy is averaged over."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        of = ",.0f" if self.high >= 1000 else ".3g"
        return f"{self.value:{of}} [{self.low:{of}}, {self.high:{of}}]"


def smoothed(curve: Sequence[float], window: int = WINDOW) -> np.ndarray:
    """Mean of each full window of consecutive entries, float64 ``[len - window + 1]``; empty for a shorter curve."""
    if len(curve) < window:
        return np.zeros(0)
    return np.convolve(curve, np.full(window, 1 / window), mode="valid")


def rollouts_to(
    target: float, *, train_reward: Sequence[float], rollouts: Sequence[float], window: int = WINDOW
) -> float:
    """Rollouts at the end of the first window whose mean accuracy reaches ``target``; infinite if none does."""
    # Slack for rounding, so that a mean of exactly the target is not lost.
    reached = np.flatnonzero(smoothed(train_reward, window) >= target - 1e-9)
    return float(rollouts[int(reached[0]) + window - 1]) if len(reached) else inf


def to_target(run: Mapping[str, Any], target: float) -> float:
    """Rollouts of a run to the target; one that never reached it counts one more than it made, a lower bound."""
    curve = run["curve"]
    needed = rollouts_to(target, train_reward=curve["train_reward"], rollouts=curve["rollouts"])
    return needed if isfinite(needed) else curve["rollouts"][-1] + 1


def interquartile_mean(values: Sequence[float] | np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean without the lowest and the highest quarter (rounded down) of the values along ``axis``."""
    return np.asarray(stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=axis))


def bootstrap(values: Sequence[float]) -> Interval:
    """Interquartile mean of finite values with its percentile interval over resampled seeds; NaN of none."""
    return _bootstrap((values,), interquartile_mean)


def bootstrap_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Ratio of the interquartile means of runs paired by seed (entry i of both), pairs resampled together."""
    assert len(ours) == len(theirs), "runs are paired by seed"

    def ratio(ours_S: np.ndarray, theirs_S: np.ndarray, axis: int = -1) -> np.ndarray:
        return interquartile_mean(ours_S, axis) / interquartile_mean(theirs_S, axis)

    return _bootstrap((ours, theirs), ratio)


def _bootstrap(samples: tuple[Sequence[float], ...], statistic) -> Interval:  # noqa: ANN001 - as scipy takes it
    arrays = tuple(np.asarray(values, dtype=np.float64) for values in samples)
    if not len(arrays[0]):
        return Interval(value=nan, low=nan, high=nan)
    value = float(statistic(*arrays))
    if len(arrays[0]) == 1:
        return Interval(value=value, low=nan, high=nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # equal values: the interval is a point
        found = stats.bootstrap(
            arrays, statistic, n_resamples=RESAMPLES, paired=True, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
    return Interval(value=value, low=float(found.low), high=float(found.high))
