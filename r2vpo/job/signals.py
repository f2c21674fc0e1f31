"""Ctrl-C and SIGTERM: the first asks the run to end cleanly, the second ends it at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from types import TracebackType
from typing import Self

import ray

SHOW_CURSOR = "\x1b[?25h"
"""The live view hides the cursor while it draws."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Set by the first signal. A context manager inside a running event loop."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def __enter__(self) -> Self:
        self.take_over()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.remove_signal_handler(number)

    def take_over(self) -> None:
        """Handle the signals from now on. Ray installs handlers of its own when it starts: call this again after."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._on_signal)

    @property
    def is_set(self) -> bool:
        """Whether the run was asked to end."""
        return self._event.is_set()

    def set(self) -> None:
        """Ask the run to end, as the first signal does."""
        self._event.set()

    async def wait(self) -> None:
        """Return once the run is asked to end."""
        await self._event.wait()

    def _on_signal(self) -> None:
        if self._event.is_set():
            # A private Ray and everything under it dies with this call; nothing else is waited for.
            ray.shutdown()
            if sys.stderr.isatty():
                sys.stderr.write(SHOW_CURSOR)
                sys.stderr.flush()
            os._exit(130)
        self._event.set()
