"""Sums over blocks of leaves: drawing one of a million by its weight takes microseconds, and so does a change.

    leaves   128 each   w0 w1 … w127 | w128 …           one per position
    blocks   128 each   w0 + … + w127 | …               one per 128 positions
    roots               sum of 128 blocks | …           one per 16,384 positions, looked through in order

Every sum is taken from left to right. So it depends on the leaves of its block alone, not on how they came to be what
they are; and as leading zeros change no sum, the same leaves shifted by a multiple of ``ALIGNMENT`` positions give the
same answers, bit for bit.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 128
ALIGNMENT = _BLOCK * _BLOCK
"""Positions under one root."""


class SumTree:
    """Non-negative float64 weights by position, 0 where nothing was set. All methods are vectorised over positions."""

    def __init__(self, size: int) -> None:
        """Room for positions 0 to ``size`` - 1, rounded up to a multiple of ``ALIGNMENT``."""
        num_roots = max(-(-size // ALIGNMENT), 1)
        self._leaves = np.zeros(num_roots * ALIGNMENT)
        self._blocks = np.zeros(num_roots * _BLOCK)
        self._roots = np.zeros(num_roots)

    @property
    def size(self) -> int:
        """Number of positions."""
        return len(self._leaves)

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(np.cumsum(self._roots)[-1])

    def get(self, positions: np.ndarray) -> np.ndarray:
        """float64 ``[N]``: the weights at int ``[N]`` positions."""
        return self._leaves[positions]

    def weights(self) -> np.ndarray:
        """float64 ``[size]``: all weights, a read-only view."""
        view = self._leaves.view()
        view.flags.writeable = False
        return view

    def set(self, positions: np.ndarray, weights: np.ndarray | float) -> None:
        """Set the weights (float ``[N]``, or one for all) at int ``[N]`` distinct positions."""
        self._leaves[positions] = weights
        blocks = np.unique(positions // _BLOCK)
        self._blocks[blocks] = _sums(self._leaves.reshape(-1, _BLOCK)[blocks])
        roots = np.unique(blocks // _BLOCK)
        self._roots[roots] = _sums(self._blocks.reshape(-1, _BLOCK)[roots])

    def find(self, masses: np.ndarray) -> np.ndarray:
        """int64 ``[N]``: for each mass (float ``[N]``, 0 to below ``total``) the position that it falls on.

        That is the first whose weight and all those before it add up to more than the mass; its weight is never 0.
        """
        total = self.total
        assert total > 0, "nothing to find in a tree without weights"
        root, rest = _descend(np.broadcast_to(self._roots, (len(masses), len(self._roots))), masses)
        block, rest = _descend(self._blocks.reshape(-1, _BLOCK)[root], rest)
        block += root * _BLOCK
        leaf, _ = _descend(self._leaves.reshape(-1, _BLOCK)[block], rest)
        return block * _BLOCK + leaf


def _sums(rows: np.ndarray) -> np.ndarray:
    """Sums of each row, from left to right, as `_descend` adds them up."""
    return rows.cumsum(axis=1)[:, -1]


def _descend(rows: np.ndarray, masses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which entry of its row each mass falls on, and how far into it."""
    ends = rows.cumsum(axis=1)
    # What is left after a subtraction may be rounded up to the whole row: it belongs to the last entry that is not 0.
    inside = np.minimum(masses, np.nextafter(ends[:, -1], 0))
    entry = (ends <= inside[:, None]).sum(axis=1)
    each = np.arange(len(rows))
    start = np.where(entry > 0, ends[each, entry - 1], 0.0)
    return entry, np.maximum(inside - start, 0.0)
