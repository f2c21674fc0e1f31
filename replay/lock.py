"""One writer per store: an advisory lock on a file beside it, which the kernel drops when its process dies."""

from __future__ import annotations

import fcntl
import os
import socket
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path

from replay.errors import DiskFull, ReplayError

NO_ROOM = frozenset({ENOSPC, EDQUOT, EFBIG})
"""What the system says when a file cannot grow: disk full, quota spent, file size limit reached."""


class StoreLock:
    """Held from construction to ``release``. ``ReplayError`` naming the holder if another writer has the store."""

    def __init__(self, store: Path) -> None:
        try:
            store.parent.mkdir(parents=True, exist_ok=True)
            self._file = store.with_name(store.name + ".lock").open("a+b", buffering=0)
        except OSError as error:
            raise _cannot_write(store, error) from error
        try:
            # Not SQLite's own exclusive mode: that would keep readers out as well.
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().decode().strip() or "another process"
            self._file.close()
            raise ReplayError(
                f"replay store {store} is in use by {holder}: two runs cannot write one store; "
                "stop the other run, or choose another name"
            ) from None
        except OSError as error:
            self._file.close()
            raise _cannot_write(store, error) from error

    def release(self) -> None:
        """Let the next writer in. May be called twice."""
        self._file.close()


def _cannot_write(store: Path, error: OSError) -> ReplayError:
    kind = DiskFull if error.errno in NO_ROOM else ReplayError
    return kind(f"replay store {store} cannot be opened for writing: {error}")
