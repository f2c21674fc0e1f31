"""Directories that are either a whole checkpoint or none: ``step-000050`` holds the state after 50 learner steps.

    step-000050.tmp/    every rank writes its part here and flushes it
        deepspeed/      weights and optimiser
        trainer.json    λ, step control, counters, RNG state
        COMPLETE        written last
    step-000050/        the same directory, renamed

A directory counts only under its final name and with its marker, so that one left behind by a crash is never picked
up. All ranks must see the same file system. The files of DeepSpeed are unpickled when they are loaded: point a run only
at checkpoints that it wrote itself. `trainer.json` is plain JSON.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NAME = re.compile(r"step-(\d{6,})")
_MARKER = "COMPLETE"
_STATE = "trainer.json"


def final_path(directory: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` learner steps lies once it is complete."""
    return directory / f"step-{step:06d}"


def temporary_path(directory: Path, step: int) -> Path:
    """Where it is written."""
    return directory / f"step-{step:06d}.tmp"


def begin(directory: Path, step: int) -> None:
    """Make an empty temporary directory; what earlier attempts, of whatever step, left behind goes."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in directory.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    temporary_path(directory, step).mkdir()


def commit(directory: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Add ``state`` and the marker to the temporary directory, make all of it durable, and rename it.

    A complete checkpoint of the same step is replaced. Returns the final path.
    """
    written, final = temporary_path(directory, step), final_path(directory, step)
    (written / _STATE).write_text(json.dumps(state, indent=1))
    flush(written)
    (written / _MARKER).touch()
    flush(written)
    if final.exists():
        final.rename(replaced := directory / f"step-{step:06d}.replaced.tmp")
        written.rename(final)
        shutil.rmtree(replaced)
    else:
        written.rename(final)
    _fsync(directory)
    return final


def complete(directory: Path) -> dict[int, Path]:
    """The complete checkpoints of ``directory`` by step, oldest first; empty if there is no such directory."""
    if not directory.is_dir():
        return {}
    named = ((match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)))
    return dict(sorted((int(match[1]), path) for match, path in named if (path / _MARKER).is_file()))


def newest(directory: Path) -> Path | None:
    """The complete checkpoint of the latest step, or None."""
    return max(complete(directory).items(), default=(0, None))[1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `commit` was given. ``ValueError`` if ``checkpoint`` is not a complete checkpoint."""
    if not (checkpoint / _MARKER).is_file():
        raise ValueError(f"{checkpoint} is not a complete checkpoint (no file {_MARKER}); name a directory step-NNNNNN")
    return json.loads((checkpoint / _STATE).read_text())


def prune(directory: Path, *, keep: int) -> None:
    """Remove all complete checkpoints but the ``keep`` newest."""
    for path in list(complete(directory).values())[:-keep]:
        _remove(path)


def flush(directory: Path) -> None:
    """Make every file and directory below durable."""
    for parent, _, files in os.walk(directory):
        for name in files:
            _fsync(Path(parent, name))
        _fsync(Path(parent))


def _remove(checkpoint: Path) -> None:
    """The marker goes first, so that a removal cut short leaves nothing that looks complete."""
    (checkpoint / _MARKER).unlink()
    shutil.rmtree(checkpoint)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
