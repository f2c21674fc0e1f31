"""The whole story of what failed, in a file: the screen gets one sentence."""

from __future__ import annotations

import asyncio
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any


class ErrorLog:
    """Appends errors with their tracebacks, also those of other processes that came along with them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.last = ""
        """The last failure in one line."""

    def add(self, what: str, failure: BaseException | None) -> None:
        """Write down ``failure``. A disk that takes no more does not make it worse."""
        self.last = f"{what}: {failure}".splitlines()[0] if failure is not None else what
        story = traceback.format_exception(failure) if failure is not None else []
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {what}\n{''.join(story)}\n")

    def on_stray(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handler for what an event loop has nobody to tell: here, and not on the screen."""
        self.add(context["message"], context.get("exception"))
