"""Groups that may be drawn for a learner step, in memory: a million of them in some 40 MB, drawn from in microseconds.

It is derived from the stored rows and from what was consumed, so it can be built anew at any time, and a draw depends
only on the generator, the step and what is in the pool: not on the order in which it came there.

**Uniform draws** take k distinct groups, all with the same chance and with weight 1.

**Draws by weight** are systematic: of M groups, one with weight w has the chance π = min(1, w / c) to be drawn, where c
is such that all chances add up to k. The groups lie side by side on a line, each as long as its chance, and are hit by
k points one apart with one uniform offset for all; none is hit twice. A drawn group gets the importance weight

    k / (M·π)        so that  E[Σ weight·f / k] = mean of f over the pool,  whatever f and the weights are

Each chance appears once in the sum and cancels. A group with w ≥ c is drawn for certain and has the weight k / M.

Of M ≤ k groups every one is drawn with weight 1: the same formula, with π = 1 and k = M.

Example, k = 2 of three groups with w = 1, 1, 2: c = 2, chances ½, ½, 1, weights 4/3, 4/3, 2/3. Half of the offsets draw
the first and the third, the others the second and the third: (4/3·a + 2/3·c)/2 and (4/3·b + 2/3·c)/2, on average
(a + b + c)/3.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from replay.rows import Rows
from replay.tree import ALIGNMENT, SumTree

_LOG2_BOUND = 500.0
"""Weights lie within 2^±this: sums of them stay finite, and none is rounded to 0."""


class SamplePolicy(Protocol):
    """What the pool asks of a policy of `sampling`."""

    @property
    def max_uses(self) -> int | None:
        """Uses after which a group is not drawn any more; None is any number."""
        ...

    @property
    def uniform(self) -> bool:
        """Whether every group has the same chance."""
        ...

    @property
    def anchor_every(self) -> int:
        """Steps after which the anchor that versions are counted from moves on."""
        ...

    def log2_weight(self, *, spread: np.ndarray, uses: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """Logarithm (base 2) of the weights, float64 ``[N]``; only their differences matter.

        ``spread`` float ``[N]``: mean absolute advantage. ``uses`` int ``[N]``. ``versions`` int ``[N]``: each group's
        oldest version, counted from the anchor; so weights that depend on the lag need not change as steps go by.
        """
        ...


class Pool:
    """Groups by id. Ids are dense, and old ones leave first: the arrays span the ids between oldest and newest."""

    def __init__(self, policy: SamplePolicy, shards: int) -> None:
        self._policy = policy
        self._shards = shards
        self._base = 0
        """Id at position 0; a multiple of ``ALIGNMENT``."""
        self._tree = SumTree(0)
        """Weight of each group, 0 where there is none."""
        self._uses = np.zeros(self._tree.size, dtype=np.int32)
        self._versions = np.zeros(self._tree.size, dtype=np.int32)
        self._spread = np.zeros(self._tree.size, dtype=np.float32)
        self._num_groups = 0
        self._anchor = 0
        self._oldest_version = 0
        """Groups older than this have expired."""
        self._ids_of_version: dict[int, array[int]] = {}
        """Ids that were added, also those removed since."""
        self._heap: list[int] = []
        """The versions above."""

    def __len__(self) -> int:
        return self._num_groups

    def __contains__(self, group_id: int) -> bool:
        position = group_id - self._base
        return 0 <= position < self._tree.size and bool(self._tree.weights()[position] > 0)

    def version(self, group_id: int) -> int:
        """Oldest version of a group that is in the pool."""
        assert group_id in self, group_id
        return int(self._versions[group_id - self._base])

    def add(self, rows: Rows, uses: np.ndarray) -> None:
        """Let groups (distinct) be drawn; ``uses`` int ``[rows]`` says how often each was consumed.

        Those that have expired or were used as often as is allowed stay out. One that is in is replaced.
        """
        allowed = rows["oldest_version"] >= self._oldest_version
        if self._policy.max_uses is not None:
            allowed &= uses < self._policy.max_uses
        rows, uses = rows[allowed], uses[allowed]
        if not len(rows):
            return
        ids = rows["id"]
        self._reserve(int(ids.min()), int(ids.max()))
        positions = ids - self._base
        self._uses[positions] = uses
        self._versions[positions] = rows["oldest_version"]
        self._spread[positions] = rows["reward_spread"]
        self._remember(ids, rows["oldest_version"])
        self._set(positions, self._weights(positions))

    def used(self, group_ids: Iterable[int]) -> None:
        """A step consumed these: each that is in the pool has one use more, and leaves it if that was its last."""
        positions = self._positions(group_ids)
        self._uses[positions] += 1
        weights = self._weights(positions)
        if self._policy.max_uses is not None:
            weights[self._uses[positions] >= self._policy.max_uses] = 0.0
        self._set(positions, weights)

    def remove(self, group_ids: Iterable[int]) -> None:
        """Draw these no more; ids that are not in the pool are passed over."""
        positions = self._positions(group_ids)
        self._set(positions, np.zeros(len(positions)))

    def drop_shard(self, shard: int) -> None:
        """Draw no more of the groups that this shard holds."""
        first = (shard + 1 - self._base) % self._shards
        positions = np.arange(first, self._tree.size, self._shards)
        positions = positions[self._tree.get(positions) > 0]
        self._set(positions, np.zeros(len(positions)))

    def expire(self, oldest_version: int) -> None:
        """Remove every group with an older oldest version, and keep such groups out from now on."""
        self._oldest_version = max(self._oldest_version, oldest_version)
        while self._heap and self._heap[0] < self._oldest_version:
            ids = self._ids_of_version.pop(heapq.heappop(self._heap))
            self.remove(ids)

    def draw(
        self, k: int, *, rng: np.random.Generator, step: int, without: Collection[int]
    ) -> list[tuple[int, int, float]]:
        """Up to ``k`` distinct groups for ``step``, none of ``without``: (id, uses, importance weight).

        All that there are, with weight 1, if they are no more than ``k``.
        """
        assert k >= 0, k
        self._move_anchor(step)
        with self._hidden(self._positions(without)) as num_hidden:
            num_groups = self._num_groups - num_hidden
            if num_groups <= k:
                positions = np.flatnonzero(self._tree.weights() > 0)
                weights = np.ones(len(positions))
            elif k == 0:
                return []
            elif self._policy.uniform:
                positions = self._tree.find(rng.choice(num_groups, k, replace=False).astype(np.float64))
                weights = np.ones(k)
            else:
                positions, chances = self._systematic(k, rng)
                weights = k / (num_groups * chances)
        ids = positions + self._base
        return list(zip(ids.tolist(), self._uses[positions].tolist(), weights.tolist(), strict=True))

    def _systematic(self, k: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Positions of ``k`` groups, int64 ``[k]``, and their chances, float64 ``[k]``."""
        weights = self._tree.weights()
        certain = np.zeros(0, dtype=np.int64)
        while len(certain) < k:
            points = np.arange(k - len(certain))
            with self._hidden(certain):
                spacing = self._tree.total / len(points)
                # A group at least as long as the points are apart is hit by one of them, whatever the offset.
                middle = np.unique(self._tree.find((points + 0.5) * spacing))
                hits = np.unique(self._tree.find((points + rng.random()) * spacing))
            too_long = middle[weights[middle] >= spacing]
            if not len(too_long):
                chances = np.concatenate([np.ones(len(certain)), weights[hits] / spacing])
                return np.concatenate([certain, hits]), chances
            certain = np.concatenate([certain, too_long])
        return certain, np.ones(len(certain))

    def _weights(self, positions: np.ndarray) -> np.ndarray:
        log2 = self._policy.log2_weight(
            spread=self._spread[positions],
            uses=self._uses[positions],
            versions=self._versions[positions] - self._anchor,
        )
        return np.exp2(np.clip(log2, -_LOG2_BOUND, _LOG2_BOUND))

    def _move_anchor(self, step: int) -> None:
        """The anchor depends on the step alone, hence weights do not depend on when a group was added."""
        anchor = step - step % self._policy.anchor_every
        if anchor != self._anchor:
            self._anchor = anchor
            there = np.flatnonzero(self._tree.weights() > 0)
            self._tree.set(there, self._weights(there))

    def _set(self, positions: np.ndarray, weights: np.ndarray) -> None:
        """At distinct positions; keeps count."""
        before = self._tree.get(positions)
        self._num_groups += int((weights > 0).sum()) - int((before > 0).sum())
        self._tree.set(positions, weights)

    @contextmanager
    def _hidden(self, positions: np.ndarray) -> Iterator[int]:
        """Nothing is drawn at these positions meanwhile; gives their number."""
        weights = self._tree.get(positions)
        self._tree.set(positions, 0.0)
        try:
            yield len(positions)
        finally:
            self._tree.set(positions, weights)

    def _positions(self, group_ids: Iterable[int]) -> np.ndarray:
        """int64: positions of those ids that are in the pool, each once."""
        positions = np.unique(np.fromiter(group_ids, dtype=np.int64)) - self._base
        positions = positions[(positions >= 0) & (positions < self._tree.size)]
        return positions[self._tree.get(positions) > 0]

    def _remember(self, ids: np.ndarray, versions: np.ndarray) -> None:
        order = np.argsort(versions, kind="stable")
        cuts = np.flatnonzero(np.diff(versions[order])) + 1
        for chunk in np.split(order, cuts):
            version = int(versions[chunk[0]])
            if version not in self._ids_of_version:
                self._ids_of_version[version] = array("q")
                heapq.heappush(self._heap, version)
            self._ids_of_version[version].frombytes(ids[chunk].astype(np.int64).tobytes())

    def _reserve(self, lowest: int, highest: int) -> None:
        """Make the arrays span these ids and those in the pool, with slack so that this is rarely needed."""
        if self._base <= lowest and highest < self._base + self._tree.size:
            return
        there = np.flatnonzero(self._tree.weights() > 0)
        if len(there):
            lowest = min(lowest, int(there[0]) + self._base)
            highest = max(highest, int(there[-1]) + self._base)
        old_tree, old_base = self._tree, self._base
        self._base = lowest - lowest % ALIGNMENT
        span = highest + 1 - self._base
        self._tree = SumTree(span + span // 2)
        to = there + old_base - self._base
        self._uses = _moved(self._uses, there, to, self._tree.size)
        self._versions = _moved(self._versions, there, to, self._tree.size)
        self._spread = _moved(self._spread, there, to, self._tree.size)
        self._tree.set(to, old_tree.get(there))


def _moved(old: np.ndarray, at: np.ndarray, to: np.ndarray, size: int) -> np.ndarray:
    new = np.zeros(size, dtype=old.dtype)
    new[to] = old[at]
    return new
