"""How a batch is drawn: the four policies of ``replay.sample``.

Every step takes F new groups out of the queue of waiting ones, by earliest due step (`limiter`). What the policies
differ in is what else is in the batch, and with what chance the `pool` gives it out:

| policy | of the batch | from the pool | chances |
|---|---|---|---|
| fresh | the F groups | nothing | |
| mixed | the F groups, then stale ones | groups consumed before, or too late to be fresh | equal |
| priority | the same | the same | by `advantage`, `age` or `uses` |
| window | a draw from the pool, which the F groups join first | everything within ``max_replay_lag`` | equal |

Unequal chances are undone by importance weights, in expectation; see `pool`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from replay.config import ReplayConfig
from replay.pool import SamplePolicy
from replay.rows import Rows

SPREAD_FLOOR = 0.01
"""Added to the mean absolute advantage, so that no group has a chance of 0: a group without signal then has 1/51 of the
chance of one whose rewards are half 0 and half 1 (mean absolute advantage 0.5), at exponent 1."""
_ANCHOR_BITS = 200
"""By how many powers of 2 weights by age may grow before versions are counted from a later anchor."""
_NEVER = 1 << 30


@dataclass(frozen=True, kw_only=True)
class _Uniform:
    """Every group in the pool has the same chance."""

    max_uses: int | None = None
    """Uses after which a group is not drawn any more."""

    @property
    def uniform(self) -> bool:
        """True."""
        return True

    @property
    def anchor_every(self) -> int:
        """Weights do not depend on versions."""
        return _NEVER

    def log2_weight(self, *, spread: np.ndarray, uses: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """Zeros."""
        return np.zeros(len(versions))


class FreshSampling(_Uniform):
    """Each group once, in order; nothing is drawn from the pool."""


class MixedSampling(_Uniform):
    """New groups first, then stale ones with equal chances."""


class WindowSampling(_Uniform):
    """New groups join the pool, and the whole batch is drawn from it with equal chances."""


@dataclass(frozen=True, kw_only=True)
class PrioritySampling:
    """New groups first, then stale ones with chances in proportion to a power of what they promise."""

    key: str
    """``advantage``: (mean absolute advantage + ``SPREAD_FLOOR``)^α. ``uses``: (1 + uses)^-α. ``age``: at α = 1 the
    weight halves with every quarter of ``max_replay_lag`` that the lag grows, 2^(-4·α·lag / max_replay_lag)."""
    exponent: float
    """α; 0 gives equal chances."""
    max_replay_lag: int
    """Largest lag (learner steps) in the pool."""
    max_uses: int | None = None
    """Uses after which a group is not drawn any more."""

    @property
    def uniform(self) -> bool:
        """Whether α is 0."""
        return self.exponent == 0

    @property
    def anchor_every(self) -> int:
        """As many steps as let the weights by age grow by 2^200."""
        if self.key != "age" or self._bits_per_step * _NEVER < _ANCHOR_BITS:
            return _NEVER
        return max(int(_ANCHOR_BITS / self._bits_per_step), 1)

    @property
    def _bits_per_step(self) -> float:
        return 4 * self.exponent / max(self.max_replay_lag, 1)

    def log2_weight(self, *, spread: np.ndarray, uses: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """float64 ``[N]``; see ``key``."""
        if self.key == "advantage":
            return self.exponent * np.log2(spread.astype(np.float64) + SPREAD_FLOOR)
        if self.key == "uses":
            return -self.exponent * np.log2(1.0 + uses)
        return self._bits_per_step * versions


def make_policy(config: ReplayConfig) -> SamplePolicy:
    """The policy that the settings name."""
    if config.sample == "fresh":
        return FreshSampling(max_uses=config.max_uses)
    if config.sample == "mixed":
        return MixedSampling(max_uses=config.max_uses)
    if config.sample == "window":
        return WindowSampling(max_uses=config.max_uses)
    return PrioritySampling(
        key=config.priority,
        exponent=config.priority_exponent,
        max_replay_lag=config.max_replay_lag,
        max_uses=config.max_uses,
    )


def fresh_candidates(rows: Rows, skip_no_signal: str, min_verdicts: int) -> np.ndarray:
    """Which groups may be trained as fresh ones, bool ``[rows]``.

    Those with ``min_verdicts`` or more, with ``skip_no_signal="all"`` only if their rewards differ.
    """
    scored = rows["num_with_reward"] >= min_verdicts
    return scored & rows["has_signal"] if skip_no_signal == "all" else scored


def stale_candidates(rows: Rows, skip_no_signal: str, min_verdicts: int) -> np.ndarray:
    """Which groups may be drawn from the pool, bool ``[rows]``.

    Those with ``min_verdicts`` or more, unless ``skip_no_signal="none"`` only if their rewards differ.
    """
    scored = rows["num_with_reward"] >= min_verdicts
    return scored if skip_no_signal == "none" else scored & rows["has_signal"]
