"""How a worker takes over published weights, and proves that it has them.

    payloads ──checksum──▶ files in memory ──pause──▶ engine.load ──resume──▶ canary ──▶ proven

Generation stands still only for the local load. Between resume and canary the worker is unproven: it takes no lease and
appends no group, so nothing that unproven weights sampled can reach the store.

See docs/weights.md.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from io import BufferedWriter

import numpy as np

from r2vpo.checksum import verify_bucket
from r2vpo.records import NO_VERSION, Stamp, SyncRecord, WeightManifest
from rollout.generation import Engine

MAX_TRIES = 3
"""Loads of one version after which a failing canary takes the worker down."""


class WeightSyncFailed(RuntimeError):  # noqa: N818 - says what happened
    """The engine's log-probs do not equal the learner's, or a bucket is damaged, after every try."""


class WeightSync:
    """The weights of one engine: which version it holds, and whether that is proven."""

    def __init__(self, engine: Engine, *, worker: str, tolerance: float) -> None:
        """``tolerance``: largest gap (nats) allowed on the canary; 1e-4 in float32, 5e-2 in bfloat16."""
        self.stamp: Stamp = (0, NO_VERSION)
        """What the engine holds."""
        self._records: list[SyncRecord] = []
        self._engine = engine
        self._worker = worker
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

        Raises ``WeightSyncFailed`` if a checksum is wrong, or if the canary still fails after ``MAX_TRIES`` loads.
        """
        with ExitStack() as undo:
            # Files without a name: however this process ends, the kernel frees them, and /dev/shm may be small.
            files = [undo.enter_context(os.fdopen(os.memfd_create("r2vpo-weights"), "wb")) for _ in payloads]
            await asyncio.to_thread(_write_buckets, manifest, payloads, files)
            paths = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in files]
            fetch_s = time.monotonic() - started_s
            gaps: list[float] = []
            while len(gaps) < MAX_TRIES:
                pause_s = await self._load(paths, manifest.version)
                gaps.append(await self._canary_gap(manifest))
                if gaps[-1] <= self._tolerance:
                    break
                await on_mismatch()
            else:
                raise WeightSyncFailed(
                    f"worker {self._worker}: after loading version {manifest.version} {MAX_TRIES} times, the engine's "
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

    async def _load(self, paths: Sequence[str], version: int) -> float:
        """Seconds during which generation stood still."""
        started_s = time.monotonic()
        async with self._engine.paused():
            self._is_proven = False
            await self._engine.load(paths, version=version)
        return time.monotonic() - started_s

    async def _canary_gap(self, manifest: WeightManifest) -> float:
        """Largest difference (nats); infinite if the engine returns a number that is none."""
        got = await self._engine.prompt_logprobs(manifest.canary.token_ids)
        gap = np.abs(got - np.array(manifest.canary.logprobs, dtype=np.float32)).max()
        return float(gap) if np.isfinite(gap) else float("inf")


def _write_buckets(
    manifest: WeightManifest, payloads: Sequence[bytes | memoryview], files: Sequence[BufferedWriter]
) -> None:
    """Check every payload against its bucket and write it to its file."""
    for spec, payload, file in zip(manifest.buckets, payloads, files, strict=True):
        try:
            verify_bucket(payload, spec)
        except ValueError as error:
            raise WeightSyncFailed(f"version {manifest.version}: {error}") from error
        file.write(payload)
        file.flush()
