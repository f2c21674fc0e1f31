"""Which payloads are given up: pure decisions over held rows, the oldest first (by oldest version, then id).

    shards ──oldest_held(limit)──▶ merged ──page──▶ Eviction.look ──ids──▶ shards.evict
                                     ▲                    │ not done: the next page
                                     └────────────────────┘

A held group may go when its lag exceeds ``replay.evict_after_lag``, when it has had ``replay.max_uses`` uses, or when
it is among the oldest of a store that is over ``replay.capacity_groups`` or ``replay.capacity_gb``. One that is
*needed* never goes: it waits for a step, is in the batch chosen for one, or was trained on since the oldest checkpoint
that the run may go back to. If all are needed there is no `room`, and no prompt is handed out until there is.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from replay.config import GIB, ReplayConfig
from replay.limiter import Grant
from replay.rows import ROW, Rows


@dataclass(frozen=True, kw_only=True)
class Victims:
    """What is to be evicted from one page of held rows."""

    group_ids: tuple[int, ...]
    """Ids, oldest first."""
    num_bytes: int
    """Sum of their payloads."""
    done: bool
    """True if no younger group need be looked at."""


class Eviction:
    """The three reasons to evict; without a setting for one it never applies."""

    def __init__(self, config: ReplayConfig) -> None:
        self._config = config

    @property
    def enabled(self) -> bool:
        """Whether anything is ever evicted."""
        config = self._config
        limits = (config.evict_after_lag, config.max_uses, config.capacity_groups, config.capacity_bytes)
        return any(limit is not None for limit in limits)

    def look(
        self,
        page: Rows,
        *,
        step: int,
        needed: Collection[int],
        held_groups: int,
        held_bytes: int,
        num_incoming: int = 0,
    ) -> Victims:
        """What to evict of a page (rows oldest first) by lag and by capacity, so that ``num_incoming`` more groups fit.

        ``step`` is the next one; ``held_groups`` and ``held_bytes`` count the whole store as it is before. For the next
        page subtract what was evicted. With ``num_incoming = num_fresh · (max_lag + 1) - waiting groups``, everything
        that may be outstanding will have room.
        """
        candidates = page[~np.isin(page["id"], np.fromiter(needed, dtype=np.int64))]
        num_lagging = int(np.sum(self._lags(candidates, step)))
        freed = np.concatenate([[0], np.cumsum(candidates["num_bytes"])])
        excess_groups, excess_bytes = self._excess(held_groups, held_bytes, num_incoming)
        enough = int(np.searchsorted(freed, excess_bytes))  # len(freed) if even all of them do not suffice
        wanted = max(num_lagging, excess_groups, enough)
        count = min(wanted, len(candidates))
        return Victims(
            group_ids=tuple(candidates["id"][:count].tolist()),
            num_bytes=int(freed[count]),
            done=len(page) == 0 or (wanted == count and not self._lags(page[-1], step)),
        )

    def used_up(self, uses: Iterable[tuple[int, int]], *, needed: Collection[int]) -> list[int]:
        """Ids of those (id, uses) that were used as often as is allowed.

        Look at what a step consumed once it is no longer needed, i.e. when a checkpoint has moved what a run may go
        back to; before that all of it is needed.
        """
        most = self._config.max_uses
        return [] if most is None else [i for i, count in uses if count >= most and i not in needed]

    def room(self, *, held_groups: int, held_bytes: int, in_flight: int) -> Grant:
        """How many more prompts may be handed out, given what is held and how many are in flight; why not more.

        A group is taken to have the mean size of those held. As eviction goes first, what is held is needed.
        """
        config = self._config
        grants = []
        if config.capacity_groups is not None:
            left = config.capacity_groups - held_groups - in_flight
            grants.append(self._grant(left, held_groups, in_flight, f"replay.capacity_groups={config.capacity_groups}"))
        if config.capacity_bytes is not None and held_groups:
            mean_bytes = held_bytes / held_groups
            left = int((config.capacity_bytes - held_bytes) // max(mean_bytes, 1)) - in_flight
            limit = f"replay.capacity_gb={config.capacity_gb:g} ({held_bytes / GIB:.3g} GiB held)"
            grants.append(self._grant(left, held_groups, in_flight, limit))
        return min(grants, key=lambda grant: grant.count, default=Grant(count=sys.maxsize))

    def _grant(self, left: int, held_groups: int, in_flight: int, limit: str) -> Grant:
        flying = f" and {in_flight} prompts in flight" if in_flight else ""
        return Grant(
            count=max(left, 0),
            reason=f"replay store is full: {held_groups} groups{flying} of {limit} are all still needed; waiting for a "
            "checkpoint after which older groups are not, or raise the capacity",
        )

    def _excess(self, held_groups: int, held_bytes: int, num_incoming: int) -> tuple[int, int]:
        """Groups and bytes above the capacities, 0 or less if there are none."""
        groups = num_bytes = 0
        if self._config.capacity_groups is not None:
            groups = held_groups + num_incoming - self._config.capacity_groups
        if self._config.capacity_bytes is not None:
            incoming_bytes = num_incoming * held_bytes // max(held_groups, 1)
            num_bytes = held_bytes + incoming_bytes - self._config.capacity_bytes
        return groups, num_bytes

    def _lags(self, rows: Rows, step: int) -> np.ndarray:
        """Which rows exceed ``evict_after_lag``."""
        most = self._config.evict_after_lag
        return step - rows["oldest_version"] > (sys.maxsize if most is None else most)


def merged(pages: Sequence[Rows], *, limit: int) -> Rows:
    """The oldest held rows of the whole store, from a page of each shard that was asked for up to ``limit`` rows.

    Oldest version first, then id. It ends where a full page ends, as that shard may hold more there; the pages after
    the last row returned are asked for next. Empty only if all pages are.
    """
    rows = np.concatenate([np.zeros(0, ROW), *pages])
    rows = rows[np.lexsort((rows["id"], rows["oldest_version"]))]
    ends = [(int(p["oldest_version"][-1]), int(p["id"][-1])) for p in pages if len(p) == limit]
    if not ends:
        return rows
    version, group_id = min(ends)
    inside = (rows["oldest_version"] < version) | ((rows["oldest_version"] == version) & (rows["id"] <= group_id))
    return rows[inside]
