"""How the bytes of a published version come to an engine that is told to load them: one class per weight transport.

    object store   payloads ──checksum──▶ files in memory ──path──▶ engine      fetched while the engine generates
    NCCL           manifest ──sizes, checksums──▶ engine ◀──broadcast── learner  received while it stands still

The manifest, the load, the version and the canary are the same for both; see docs/weights.md.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from io import BufferedWriter
from typing import Any, Protocol

from r2vpo.checksum import verify_bucket
from r2vpo.records import WeightManifest

Updates = Sequence[Mapping[str, Any]]
"""What vLLM's weight transfer takes as ``update_info``, one after the other."""


class WeightSyncFailed(RuntimeError):  # noqa: N818 - says what happened
    """The engine's log-probs do not equal the learner's, or a bucket is damaged, after every try."""


class Delivery(Protocol):
    """One weight transport, as a worker sees it."""

    max_tries: int
    """Loads of one version after which a failing canary takes the worker down."""

    def staged(
        self, manifest: WeightManifest, payloads: Sequence[bytes | memoryview]
    ) -> AbstractAsyncContextManager[Updates]:
        """The updates that load the manifest's weights, which the engine can apply until the context ends.

        ``WeightSyncFailed`` if a payload is not what the manifest says.
        """
        ...


class FileDelivery:
    """Payloads from the object store, checked here and handed over as files in memory."""

    max_tries = 3

    @asynccontextmanager
    async def staged(self, manifest: WeightManifest, payloads: Sequence[bytes | memoryview]) -> AsyncIterator[Updates]:
        """See ``Delivery.staged``."""
        with ExitStack() as undo:
            # Files without a name: however this process ends, the kernel frees them, and /dev/shm may be small.
            files = [undo.enter_context(os.fdopen(os.memfd_create("r2vpo-weights"), "wb")) for _ in payloads]
            await asyncio.to_thread(_write_buckets, manifest, payloads, files)
            yield [{"path": f"/proc/{os.getpid()}/fd/{file.fileno()}"} for file in files]


class BroadcastDelivery:
    """Buckets that the learner broadcasts once all engines wait for them; the engine's process checks them."""

    max_tries = 1  # the learner broadcasts once

    @asynccontextmanager
    async def staged(self, manifest: WeightManifest, payloads: Sequence[bytes | memoryview]) -> AsyncIterator[Updates]:
        """See ``Delivery.staged``."""
        assert not payloads, "a broadcast leaves no payload in the object store"
        yield [
            {
                "names": [bucket.tensors[0].name for bucket in manifest.buckets],
                "dtype_names": ["uint8"] * len(manifest.buckets),
                "shapes": [[bucket.num_bytes] for bucket in manifest.buckets],
                "checksums": [bucket.checksum for bucket in manifest.buckets],
            }
        ]


def make_delivery(transport: str) -> Delivery:
    """The worker's side of ``learner.weight_transport``."""
    return BroadcastDelivery() if transport == "nccl" else FileDelivery()


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
