"""What foreign code prints, passed on to a log that it cannot fill."""

from __future__ import annotations

import os

ITEM_BYTES = 8 * 2**10
"""Longest output of one response's reward that is passed on (bytes)."""
TOTAL_BYTES = 16 * 2**20
"""Longest output of one reward process over the whole run, restarts included (bytes)."""


class BoundedOutput:
    """Writes to a descriptor until a bound is reached, says so once, and drops the rest."""

    def __init__(self, descriptor: int, *, item_bytes: int = ITEM_BYTES, total_bytes: int = TOTAL_BYTES) -> None:
        self._descriptor = descriptor
        self._item_bytes = item_bytes
        self._total_left = total_bytes
        self._item_left = item_bytes

    def next_item(self) -> None:
        """Give the next item its own share."""
        self._item_left = self._item_bytes

    def write(self, data: bytes) -> None:
        """Pass on what there is room for."""
        room = min(self._item_left, self._total_left)
        if not room:
            return
        self._item_left -= min(room, len(data))
        self._total_left -= min(room, len(data))
        self._write(data[:room])
        if not self._total_left:
            self._write(b"\n[nothing that rewards print is written down from here on]\n")
        elif not self._item_left:
            self._write(b"\n[the rest of what the reward prints for this response is left out]\n")

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._descriptor, data) :]
