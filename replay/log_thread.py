"""The consumption log in a thread of its own: SQLite blocks, the service must not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from replay.consumption import ConsumptionLog
from replay.errors import DiskFull, ReplayError

RETRY_S = 1.0
"""Between two attempts to write to a full disk (seconds)."""

T = TypeVar("T")


class LogThread:
    """Runs calls on a log one after the other. Construct it in any thread, use it in one event loop."""

    def __init__(self, open_log: Callable[[], ConsumptionLog]) -> None:
        """``open_log`` runs in the thread; whatever it raises is raised here."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="replay-log")
        self._closed = False
        self.trouble = ""
        """What keeps the log from being written just now; "" if nothing does."""
        try:
            self.log = self._thread.submit(open_log).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def do(self, work: Callable[[ConsumptionLog], T]) -> T:
        """``work(log)`` in the thread; a full disk is waited for."""
        while True:
            try:
                result = await self.ask(work)
            except DiskFull as error:
                self.trouble = f"{error}; make room, it then goes on by itself"
                await asyncio.sleep(RETRY_S)
            else:
                self.trouble = ""
                return result

    async def ask(self, work: Callable[[ConsumptionLog], T]) -> T:
        """``work(log)`` in the thread, once."""
        if self._closed:
            raise ReplayError(f"replay store {self.log.path} is closed")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, self.log)

    async def close(self) -> None:
        """Close the log and end the thread. May be called twice."""
        if not self._closed:
            await self.do(lambda log: log.close())
            self._closed = True
            self._thread.shutdown()
