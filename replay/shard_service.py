"""One shard of the replay store behind an asyncio interface: many writers, one transaction, one fsync.

    worker ──append─▶ [queue] ──▶ [ShardStore, one transaction for all queued] ──appended(rows)──▶ listener ──▶ answer

waits for: the disk. While it is full the queue is kept and tried again, and the listener is told, so that nothing is
lost and everybody can see why the workers stand still. A group is acknowledged once it is on disk and the listener
knows of it. SQLite runs in one thread of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from replay.errors import DiskFull, ReplayError
from replay.rows import EncodedGroup, Rows
from replay.shard import ShardStore

RETRY_S = 1.0
"""Between two attempts to write to a full disk (seconds); nothing tells when there is room again."""
SLOW_S = 5.0
"""Seconds after which a write that still goes on is spoken of."""
MAX_GROUPS = 64
"""Most groups in one transaction: others need not wait for more than that."""

T = TypeVar("T")


class Listener(Protocol):
    """Who must know what a shard holds before an append is acknowledged."""

    async def appended(self, shard: int, rows: Rows) -> None:
        """These groups are new and durable. May be said twice."""
        ...

    async def stalled(self, shard: int, sentence: str, keys: Sequence[str]) -> None:
        """Groups of ``keys`` wait for the disk, for the reason that ``sentence`` gives; empty once that is over."""
        ...


class ShardService:
    """The writer of one shard's file. Construct it in any thread, use it in one event loop."""

    def __init__(
        self, path: str, *, shard: int = 0, shards: int = 1, must_exist: bool = False, listener: Listener
    ) -> None:
        """``must_exist``: a missing file is an error, since the run has groups in it. Errors as in ``ShardStore``."""
        self._shard = shard
        self._listener = listener
        self._pending: list[tuple[EncodedGroup, asyncio.Future[bool]]] = []
        self._writing: list[str] = []
        self._writer: asyncio.Task[None] | None = None
        self._trouble = ""
        self._since_s = 0.0
        self._closed = False  # it takes no more groups, but writes those it has …
        self._shut = False  # … until it has let go of the file
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"replay-shard-{shard}")
        try:
            self._store = self._thread.submit(
                lambda: ShardStore(Path(path), shard=shard, shards=shards, must_exist=must_exist)
            ).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def append(self, group: EncodedGroup) -> bool:
        """Return once the group is durable and known. True if it is new, False if its key was there already.

        Waits as long as the disk is full; ``ReplayError`` for any other fault of the disk.
        """
        if self._closed:
            raise ReplayError(f"replay store {self._store.path} is closed")
        done = asyncio.get_running_loop().create_future()
        self._pending.append((group, done))
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_pending())
        return await done

    async def read(self, group_ids: Sequence[int]) -> tuple[list[bytes | None], dict[int, str]]:
        """Payloads in the order of the ids, None where one cannot be read, and why: id → sentence."""
        return await self._in_store(lambda: self._store.read(group_ids))

    async def rows(self, *, oldest_version: int = 0, after_id: int = 0) -> Rows:
        """See ``ShardStore.rows``."""
        return await self._in_store(lambda: self._store.rows(oldest_version=oldest_version, after_id=after_id))

    async def epochs(self) -> dict[int, int]:
        """See ``ShardStore.epochs``."""
        return await self._in_store(self._store.epochs)

    async def answered(self, epoch: int) -> np.ndarray:
        """See ``ShardStore.answered``."""
        return await self._in_store(lambda: self._store.answered(epoch))

    async def evict(self, group_ids: Sequence[int]) -> tuple[int, int]:
        """Drop payloads; returns how many, and their bytes."""
        return await self._in_store(lambda: self._store.evict(group_ids))

    async def oldest_held(self, *, limit: int, after: tuple[int, int] = (-1, 0)) -> Rows:
        """See ``ShardStore.oldest_held``."""
        return await self._in_store(lambda: self._store.oldest_held(limit=limit, after=after))

    async def held(self) -> tuple[int, int]:
        """Groups and bytes of the payloads that are held."""
        return await self._in_store(self._store.held)

    async def stats(self) -> dict[str, Any]:
        """What the shard holds; does not wait for the disk."""
        return {**self._store.stats(), "pending": len(self._pending) + len(self._writing), "trouble": self._trouble}

    async def close(self) -> None:
        """Write what is queued, unless the disk is full, and close the file. May be called twice."""
        if self._closed:
            return
        self._closed = True
        while self._writer is not None and not self._trouble:
            await asyncio.wait([self._writer], timeout=0.1)
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])
        self._shut = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._store.close)
        self._thread.shutdown()

    async def _write_pending(self) -> None:
        """Write until the queue is empty; whoever waits for a group gets its answer, or the error."""
        while self._pending:
            batch, self._pending = self._pending[:MAX_GROUPS], self._pending[MAX_GROUPS:]
            self._writing = [group.key for group, _ in batch]
            try:
                rows, new = await self._write([group for group, _ in batch])
                if any(new):
                    # A key twice in one call has one row, and is new only once.
                    await self._listener.appended(self._shard, rows[np.array(new)])
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - handed to those who wait for it
                failure = ReplayError("the shard is closed") if isinstance(error, asyncio.CancelledError) else error
                for _, done in batch:
                    if not done.done():
                        done.set_exception(failure)
                if isinstance(error, asyncio.CancelledError):
                    for _, done in self._pending:
                        if not done.done():
                            done.set_exception(ReplayError("the shard is closed"))
                    self._pending = []
                continue
            for (_, done), is_new in zip(batch, new, strict=True):
                if not done.done():  # else its caller has gone
                    done.set_result(is_new)
        self._writing, self._writer = [], None

    async def _write(self, groups: list[EncodedGroup]) -> tuple[Rows, list[bool]]:
        """One transaction, as often as it takes the disk to have room for it."""
        while True:
            try:
                result = await self._while_spoken_of(self._in_store(lambda: self._store.append_many(groups)))
            except DiskFull as error:
                await self._speak(f"{error}; make room, it then goes on by itself")
                await asyncio.sleep(RETRY_S)
            else:
                await self._speak("")
                return result

    async def _while_spoken_of(self, write: Any) -> tuple[Rows, list[bool]]:
        """Await ``write``; a slow disk is named while it lasts."""
        started_s, task = time.monotonic(), asyncio.ensure_future(write)
        while not (await asyncio.wait([task], timeout=SLOW_S))[0]:
            seconds = time.monotonic() - started_s
            await self._speak(f"{self._store.path}: the disk is slow, a write has taken {seconds:.0f} s so far")
        return task.result()

    async def _speak(self, sentence: str) -> None:
        if sentence or self._trouble:
            self._trouble = sentence
            queued = [group.key for group, _ in self._pending]
            await self._listener.stalled(self._shard, sentence, [*self._writing, *queued])

    async def _in_store(self, work: Callable[[], T]) -> T:
        if self._shut:
            raise ReplayError(f"replay store {self._store.path} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
