"""The shards as the service knows them: how to reach each, what is wrong with it, and what they hold together."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from replay.dispatcher import AHEAD, DAMAGED, LATE
from replay.errors import ReplayError
from replay.rows import Rows


class Shard(Protocol):
    """A shard as the service asks it; see ``ShardService``."""

    async def rows(self, *, oldest_version: int = 0, after_id: int = 0) -> Rows:
        """See ``ShardStore.rows``."""
        ...

    async def epochs(self) -> dict[int, int]:
        """See ``ShardStore.epochs``."""
        ...

    async def answered(self, epoch: int) -> np.ndarray:
        """See ``ShardStore.answered``."""
        ...

    async def evict(self, group_ids: Sequence[int]) -> tuple[int, int]:
        """Drop payloads; returns how many, and their bytes."""
        ...

    async def oldest_held(self, *, limit: int, after: tuple[int, int] = (-1, 0)) -> Rows:
        """See ``ShardStore.oldest_held``."""
        ...

    async def held(self) -> tuple[int, int]:
        """Groups and bytes of the payloads that are held."""
        ...

    async def stats(self) -> dict[str, Any]:
        """What the shard holds; see ``ShardStore.stats``."""
        ...


class ShardState:
    """What the service knows of one shard."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.link: Shard | None = None
        self.generation = 0
        """How often it was attached."""
        self.known_id = 0
        """The newest group that the index knows; ids of a shard only grow."""
        self.trouble = "not started yet"
        self.since_s = time.time()
        self.last_stats: dict[str, Any] = {}

    def speak(self, trouble: str) -> None:
        """Say what is wrong, or with "" that nothing is."""
        if bool(trouble) != bool(self.trouble):
            self.since_s = time.time()
        self.trouble = trouble

    async def refresh(self) -> None:
        """Ask the shard for its counts; one that is away keeps its last ones."""
        if self.link is not None:
            with suppress(ReplayError):
                self.last_stats = await self.link.stats()


def count(shards: Sequence[ShardState], logged: Mapping[str, Any], *, min_verdicts: int) -> dict[str, Any]:
    """Counts over all shards, as last heard of, beside those of the consumption log.

    Groups of fewer than ``min_verdicts`` are ``unscored``; ``no_signal`` are those of the others whose verdicts agree.
    """
    heard = [state.last_stats for state in shards if state.last_stats]
    summed = ("groups", "trajectories", "sampled_tokens", "held_groups", "held_bytes")
    with_verdicts = sum_by_key([stats["verdicts"] for stats in heard])
    equal = sum_by_key([stats["equal_verdicts"] for stats in heard])
    return {
        "version": logged["version"],
        **{key: sum(stats[key] for stats in heard) for key in summed},
        "no_signal": sum(groups for verdicts, groups in equal.items() if verdicts >= min_verdicts),
        "outcomes": sum_by_key([stats["outcomes"] for stats in heard]),
        "uses": logged["uses"],
        "unusable": {
            "unscored": sum(groups for verdicts, groups in with_verdicts.items() if verdicts < min_verdicts),
            **{reason: logged["aside"].get(reason, 0) for reason in (LATE, AHEAD, DAMAGED)},
        },
        "shards": [
            {
                "shard": state.number,
                "attached": state.link is not None,
                **{key: state.last_stats.get(key, 0) for key in ("groups", "held_bytes", "pending")},
                "trouble": state.trouble,
            }
            for state in shards
        ],
    }


def sum_by_key(counts: Sequence[Mapping[Any, int]]) -> dict[Any, int]:
    """``sum_by_key([{"a": 1}, {"a": 2, "b": 3}]) == {"a": 3, "b": 3}``."""
    keys = dict.fromkeys(key for counted in counts for key in counted)
    return {key: sum(counted.get(key, 0) for counted in counts) for key in keys}
