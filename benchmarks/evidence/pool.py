"""The replay list: the groups of the last iterations, and the draw of stale ones from it.

The draw by weight is that of `replay.pool` (systematic, importance weight k / (M·π)), on an array instead of a tree, so
that a benchmark of hundreds of runs needs no store.

Axes: ``_B`` groups, ``_n`` members, ``_P`` prompt tokens, ``_T`` answer tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from replay.sampling import PrioritySampling


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups with all that training needs to know of them; tensors with the groups along the first axis."""

    prompt_BP: Tensor
    answer_BnT: Tensor
    behavior_logp_BnT: Tensor
    reward_Bn: Tensor
    """float64; as the learner sees them."""
    version_B: Tensor
    """Version that sampled all tokens of the group."""
    born_B: Tensor
    """Learner step at which the group was fresh."""
    draw_weight_B: Tensor
    """Importance weight of the draw; 1 unless drawn with unequal chances."""

    def __len__(self) -> int:
        return len(self.prompt_BP)

    def take(self, rows: Tensor) -> Groups:
        """Some of the groups, by index or by a mask."""
        return Groups(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})

    @property
    def has_signal_B(self) -> Tensor:
        """bool: whether the rewards of a group differ."""
        return self.reward_Bn.amax(1) > self.reward_Bn.amin(1)


def concatenate(parts: Sequence[Groups]) -> Groups:
    """All groups of the parts, in order."""
    return Groups(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Groups)})


class ReplayList:
    """Groups of the last ``max_age`` learner steps; those without signal are never drawn."""

    def __init__(self, *, max_age: int, priority: str, rng: np.random.Generator) -> None:
        self._parts: deque[Groups] = deque(maxlen=max_age)
        self._uses: deque[np.ndarray] = deque(maxlen=max_age)
        self._priority, self._max_age, self._rng = priority, max_age, rng

    def append(self, fresh: Groups) -> None:
        """Remember groups that were trained on once."""
        kept = fresh.take(fresh.has_signal_B)
        self._parts.append(kept)
        self._uses.append(np.ones(len(kept), int))

    def draw(self, count: int) -> list[Groups]:
        """``count`` different groups, or all there are: a list of one part, or an empty one where there are none."""
        uses = np.concatenate([*self._uses, np.zeros(0, int)])
        if count == 0 or len(uses) == 0:
            return []
        pool = concatenate(self._parts)
        rows, weight = systematic_draw(self._weights(pool, uses), count, self._rng)
        uses[rows] += 1
        self._uses = deque(np.split(uses, np.cumsum([len(part) for part in self._parts])[:-1]), self._max_age)
        drawn = pool.take(torch.from_numpy(rows))
        return [Groups(**{**vars(drawn), "draw_weight_B": torch.from_numpy(weight).to(drawn.draw_weight_B)})]

    def _weights(self, pool: Groups, uses: np.ndarray) -> np.ndarray:
        """Relative chances by the product's own formula; age counts from the version, as there."""
        if self._priority == "uniform":
            return np.ones(len(pool))
        policy = PrioritySampling(key=self._priority, exponent=1.0, max_replay_lag=self._max_age)
        reward_Bn, version_B = pool.reward_Bn.numpy(), pool.version_B.numpy()
        spread_B = np.abs(reward_Bn - reward_Bn.mean(1, keepdims=True)).mean(1)
        return 2.0 ** policy.log2_weight(spread=spread_B, uses=uses, versions=version_B - version_B.max())


def systematic_draw(weight_M: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """``count`` different rows of M with chances π = min(1, weight / c), Σ π = count; all rows if M ≤ count.

    Returns the rows and their importance weights ``count / (M·π)``, which are 1 where all weights are equal.
    """
    num_rows = len(weight_M)
    if num_rows <= count:
        return np.arange(num_rows), np.ones(num_rows)
    chance_M, free_M = np.ones(num_rows), np.ones(num_rows, bool)
    while True:
        chance_M[free_M] = weight_M[free_M] * (count - (~free_M).sum()) / weight_M[free_M].sum()
        if not (too_likely_M := free_M & (chance_M > 1)).any():
            break
        chance_M[too_likely_M], free_M[too_likely_M] = 1.0, False
    # Shuffled, since the hits are a regular comb: neighbours would else never be drawn together.
    order = rng.permutation(num_rows)
    edges = np.cumsum(chance_M[order])
    points = rng.uniform() + np.arange(count)
    rows = order[np.searchsorted(edges, points * edges[-1] / count, side="right")]
    return rows, count / (num_rows * chance_M[rows])
