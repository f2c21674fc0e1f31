"""How a worker takes over published weights, and proves that it has them.

    payloads ──delivery──▶ updates ──pause──▶ engine.load ──resume──▶ canary ──▶ proven

Generation stands still only for the local load. Between resume and canary the worker is unproven: it takes no lease and
appends no group, so nothing that unproven weights sampled can reach the store.

See docs/weights.md.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from r2vpo.records import NO_VERSION, Stamp, SyncRecord, WeightManifest
from rollout.delivery import Delivery, FileDelivery, Updates, WeightSyncFailed
from rollout.generation import Engine


class WeightSync:
    """The weights of one engine: which version it holds, and whether that is proven."""

    def __init__(self, engine: Engine, *, worker: str, tolerance: float, delivery: Delivery | None = None) -> None:
        """``tolerance``: largest gap (nats) allowed on the canary; 1e-4 in float32, 5e-2 in bfloat16.

        ``delivery`` is files in memory unless given.
        """
        self.stamp: Stamp = (0, NO_VERSION)
        """What the engine holds."""
        self._records: list[SyncRecord] = []
        self._engine = engine
        self._worker = worker
        self._delivery = delivery or FileDelivery()
        self._tolerance = tolerance
        self._changed = asyncio.Condition()
        self._is_proven = False

    @property
    def version(self) -> int:
        """Version of the engine's weights; ``NO_VERSION`` before the first verified sync."""
        return self.stamp[1]

    def take_records(self) -> tuple[SyncRecord, ...]:
        """The syncs since the last call."""
        records, self._records = tuple(self._records), []
        return records

    async def proven(self) -> None:
        """Wait until the engine's weights are proven by the canary. Returns at once when they are."""
        if self._is_proven:
            return
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_proven)

    async def reached(self, version: int) -> None:
        """Wait until proven weights of at least ``version`` are loaded."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_proven and self.version >= version)

    async def newer(self, stamp: Stamp) -> None:
        """Wait until proven weights newer than ``stamp`` are loaded."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._is_proven and self.stamp > stamp)

    async def apply(
        self,
        manifest: WeightManifest,
        payloads: Sequence[bytes | memoryview],
        *,
        started_s: float,
        on_mismatch: Callable[[], Awaitable[None]],
    ) -> None:
        """Load the manifest's weights, whose fetch began at ``started_s`` (monotonic seconds).

        Calls ``on_mismatch`` after every failing canary.

        Raises ``WeightSyncFailed`` if a checksum is wrong, or if the canary still fails after as many loads as its
        transport allows.
        """
        async with self._delivery.staged(manifest, payloads) as updates:
            fetch_s = time.monotonic() - started_s
            gaps: list[float] = []
            while len(gaps) < self._delivery.max_tries:
                pause_s = await self._load(updates, manifest.version)
                gaps.append(await self._canary_gap(manifest))
                if gaps[-1] <= self._tolerance:
                    break
                await on_mismatch()
            else:
                raise WeightSyncFailed(
                    f"worker {self._worker}: after loading version {manifest.version} {len(gaps)} times, the engine's "
                    f"log-probs on the canary differ from the learner's by {gaps} nats, allowed are {self._tolerance}"
                )
        self._records.append(
            SyncRecord(
                worker=self._worker,
                version=manifest.version,
                fetch_s=fetch_s,
                pause_s=pause_s,
                canary_gap=max(gaps),
            )
        )
        async with self._changed:
            self.stamp, self._is_proven = manifest.stamp, True
            self._changed.notify_all()

    async def _load(self, updates: Updates, version: int) -> float:
        """Seconds during which generation stood still."""
        started_s = time.monotonic()
        async with self._engine.paused():
            self._is_proven = False
            await self._engine.load(updates, version=version)
        return time.monotonic() - started_s

    async def _canary_gap(self, manifest: WeightManifest) -> float:
        """Largest difference (nats); infinite if the engine returns a number that is none."""
        got = await self._engine.prompt_logprobs(manifest.canary.token_ids)
        gap = np.abs(got - np.array(manifest.canary.logprobs, dtype=np.float32)).max()
        return float(gap) if np.isfinite(gap) else float("inf")
