"""Which prompts are to do: an endless sequence of epochs, each a seeded permutation of the task's prompts.

Nothing here is saved. At the start, whatever key is not in the store is still to do, so a crash neither skips a prompt
nor has one answered twice. Leases live in memory, with deadlines; a lease that expires or is released is handed out
again before any new prompt. Prompts of a shard that is away are kept back until it returns. Times are Unix seconds and
come from the caller.

    to do ──lease──▶ live ──answered──▶ done (in the store)
      ▲               │
      └──release, expire

See docs/lag.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from r2vpo.records import Lease, prompt_key
from replay.rows import shard_of_key
from replay.serialize import parse_key


@dataclass(frozen=True, kw_only=True)
class LiveLease:
    """A lease and who holds it."""

    worker: str
    lease: Lease


class PromptLedger:
    """Hands out each prompt key at most once at a time, and never one that is in the store.

    ``done`` says which prompts of an epoch are in the store: their indices, int64. ``ValueError`` if it names a prompt
    that the task does not have: the store belongs to other data.
    """

    def __init__(
        self,
        *,
        num_prompts: int,
        seed: int,
        done: Mapping[int, np.ndarray] = MappingProxyType({}),
        shards: int = 1,
    ) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts={num_prompts}: the task has no prompt to train on")
        self._num_prompts = num_prompts
        self._seed = seed
        self._shards = shards
        self._live: dict[str, LiveLease] = {}
        self._returned: deque[tuple[int, int]] = deque()
        self._kept_back: dict[int, deque[tuple[int, int]]] = {}  # prompts of shards that are away
        self._done: dict[int, np.ndarray] = {}  # bool [num_prompts] of every epoch that is not over
        self._epoch = -1
        self._order: Iterator[int] = iter(())
        for epoch, index_N in done.items():
            if len(index_N):
                self.check(prompt_key(epoch, int(index_N.max())))
                self._bitmap(epoch)[index_N] = True

    @property
    def live(self) -> Mapping[str, LiveLease]:
        """Leases in flight by key."""
        return MappingProxyType(self._live)

    @property
    def next_deadline_s(self) -> float:
        """Unix time at which the next lease expires; infinity if none is live."""
        return min((held.lease.deadline_s for held in self._live.values()), default=float("inf"))

    def check(self, key: str) -> tuple[int, int]:
        """Epoch and index of ``key``; ``ValueError`` if it is malformed or the task has no such prompt."""
        epoch, index = parse_key(key)
        if index >= self._num_prompts:
            raise ValueError(
                f"prompt {key} does not exist: the task has {self._num_prompts} prompts; "
                "a store goes on only with the data it was begun with"
            )
        return epoch, index

    def lease(self, *, worker: str, version: int, now_s: float, lease_s: float) -> Lease:
        """The next prompt to do, until ``now_s + lease_s``: one that came back first, else the next of the order.

        At least one shard must be there.
        """
        epoch, index = self._next()
        key = prompt_key(epoch, index)
        lease = Lease(key=key, epoch=epoch, index=index, version=version, deadline_s=now_s + lease_s)
        self._live[key] = LiveLease(worker=worker, lease=lease)
        return lease

    def release(self, *, worker: str, keys: Iterable[str]) -> list[str]:
        """Take leases back from ``worker``; those of ``keys`` that it no longer holds are left alone."""
        held = [key for key in dict.fromkeys(keys) if key in self._live and self._live[key].worker == worker]
        self._take_back(held)
        return held

    def extend(self, keys: Iterable[str], *, deadline_s: float) -> None:
        """Let live leases run longer: their groups are finished and wait for the disk."""
        for key in keys:
            if key in self._live:
                held = self._live[key]
                self._live[key] = replace(held, lease=replace(held.lease, deadline_s=deadline_s))

    def expire(self, now_s: float) -> list[str]:
        """Take back every lease whose deadline has come."""
        expired = [key for key, held in self._live.items() if held.lease.deadline_s <= now_s]
        self._take_back(expired)
        return expired

    def answered(self, key: str) -> None:
        """``key`` has become durable in the store, by whoever answered it."""
        epoch, index = self.check(key)
        if self._live.pop(key, None) is not None:
            return
        for to_do in (self._returned, *self._kept_back.values()):
            if (epoch, index) in to_do:
                to_do.remove((epoch, index))
                return
        if epoch >= self._epoch:
            self._bitmap(epoch)[index] = True

    def open(self) -> set[tuple[int, int]]:
        """Epoch and index of every prompt that was handed out, or would have been, and is not answered."""
        live = {(held.lease.epoch, held.lease.index) for held in self._live.values()}
        return live.union(self._returned, *self._kept_back.values())

    def keep_back(self, shard: int) -> None:
        """Hand out no prompt of ``shard`` for now: its answers could not be stored."""
        self._kept_back.setdefault(shard, deque())

    def bring_back(self, shard: int) -> None:
        """The prompts of ``shard`` may be handed out again; those kept back come first."""
        self._returned.extendleft(reversed(self._kept_back.pop(shard, ())))

    def _take_back(self, keys: list[str]) -> None:
        for key in keys:
            lease = self._live.pop(key).lease
            self._returned.append((lease.epoch, lease.index))

    def _next(self) -> tuple[int, int]:
        assert len(self._kept_back) < self._shards, "every shard is away"
        while True:
            prompt = self._returned.popleft() if self._returned else self._advance()
            away = self._kept_back.get(shard_of_key(prompt_key(*prompt), self._shards))
            if away is None:
                return prompt
            away.append(prompt)

    def _advance(self) -> tuple[int, int]:
        """The next prompt of the order that is not in the store."""
        while True:
            for index in self._order:
                done = self._done.get(self._epoch)
                if done is None or not done[index]:
                    return self._epoch, index
            self._done.pop(self._epoch, None)
            self._epoch += 1
            rng = np.random.default_rng([self._seed, self._epoch])
            self._order = iter(rng.permutation(self._num_prompts).tolist())

    def _bitmap(self, epoch: int) -> np.ndarray:
        if epoch not in self._done:
            self._done[epoch] = np.zeros(self._num_prompts, dtype=np.bool_)
        return self._done[epoch]
