"""Which trajectories share a forward pass, and on which rank.

Every rank computes the same plan from the same batch, so that none has to ask the others. All ranks get the same number
of micro-batches, if need be empty ones: under ZeRO-3 every forward and backward pass is a collective.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import ceil

Bins = list[list[int]]
"""Indices into the sizes that were given, one list per bin."""


def balanced_bins(sizes: Sequence[int], *, multiple: int, capacity: int) -> Bins:
    """Deal ``sizes`` (tokens) to bins of at most ``capacity`` tokens; an item above ``capacity`` gets a bin of its own.

    The number of bins is the smallest multiple of ``multiple``, at least one, for which the greedy rule (largest item
    first, each to the emptiest bin) succeeds. Bins come fullest first; some may be empty.

    >>> balanced_bins([5, 3, 3, 2, 1], multiple=2, capacity=8)
    [[0, 3], [1, 2, 4]]
    """
    oversized = sum(size > capacity for size in sizes)
    by_load = oversized + ceil(sum(size for size in sizes if size <= capacity) / capacity)
    # Two items above half the capacity never share a bin; starting there saves the search many vain rounds.
    fewest = max(by_load, sum(2 * size > capacity for size in sizes), 1)
    num_bins = ceil(fewest / multiple) * multiple
    while True:
        bins = _deal(sizes, num_bins)
        if all(len(members) == 1 or load <= capacity for load, members in bins):
            return [members for _, members in bins]
        num_bins += multiple


def deal_to_ranks(sizes: Sequence[int], *, ranks: int, capacity: int) -> list[Bins]:
    """Micro-batches ``[rank][i]`` of ``sizes``: equally many per rank, the i-th ones of alike size."""
    bins = balanced_bins(sizes, multiple=ranks, capacity=capacity)
    return [bins[rank::ranks] for rank in range(ranks)]


def level(bins_per_rank: Sequence[Bins]) -> list[Bins]:
    """The same micro-batches with empty ones appended, so that all ranks have equally many."""
    most = max(len(bins) for bins in bins_per_rank)
    return [bins + [[] for _ in range(most - len(bins))] for bins in bins_per_rank]


def _deal(sizes: Sequence[int], num_bins: int) -> list[tuple[int, list[int]]]:
    bins: list[tuple[int, list[int]]] = [(0, []) for _ in range(num_bins)]
    heap = [(0, b) for b in range(num_bins)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, b = heapq.heappop(heap)
        members = bins[b][1]
        members.append(index)
        bins[b] = (load + sizes[index], members)
        heapq.heappush(heap, (load + sizes[index], b))
    return sorted(bins, key=lambda entry: -entry[0])
