"""Where a process of a job writes what it and its libraries print."""

from __future__ import annotations

import os
from pathlib import Path


def redirect_output(path: Path) -> None:
    """Append this process's stdout and stderr, and those of processes it starts, to the file at ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
