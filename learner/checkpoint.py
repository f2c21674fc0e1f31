"""Directories that are either a whole checkpoint or none: ``step-000050`` holds the state after 50 learner steps.

    step-000050.tmp/    every rank writes its part here and flushes it
        deepspeed/      weights and optimiser
        trainer.json    λ, step control, counters, RNG state
        COMPLETE        written last: length of every file, checksum of trainer.json
    step-000050/        the same directory, renamed

A directory counts only under its final name and with its marker, so that one left behind by a crash is never picked
up. What the marker lists and is not there was lost later: an error, for somebody must decide to go back further.

The run can be resumed at the newest ``keep_checkpoints`` (`resumable`): the store holds what that takes. Those kept for
good beside them (``keep_every``) are weights to look at, and places from which `replay-step` begins.

All ranks must see the same file system. The files of DeepSpeed are pickles: `pickles.py` refuses any that DeepSpeed
did not write before they are loaded, and PyTorch checks their bytes. `trainer.json` is plain JSON: a digit that
changed in it would be a silent wrong number, hence its checksum.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from zlib import crc32

_NAME = re.compile(r"step-(\d{6,})")
_MARKER = "COMPLETE"
_STATE = "trainer.json"
_PIN_PREFIX = ".pinned-"


class SaveFailed(RuntimeError):  # noqa: N818 - says what happened
    """A checkpoint could not be written, such as for want of room; those that were there before still are."""


class DamagedCheckpoint(ValueError):  # noqa: N818 - says what happened
    """A checkpoint was complete, and a part of it is gone or unreadable. The message says how to go on without it."""


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
    files = sorted(path for path in written.rglob("*") if path.is_file())
    lengths = {str(path.relative_to(written)): path.stat().st_size for path in files}
    marker = {"lengths": lengths, "state_crc32": crc32((written / _STATE).read_bytes())}
    (written / _MARKER).write_text(json.dumps(marker, indent=1))
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


def resumable(directory: Path, *, keep: int) -> dict[int, Path]:
    """The ``keep`` newest complete checkpoints by step, oldest first: those at which the run can be resumed."""
    return dict(list(complete(directory).items())[-keep:])


def discard(directory: Path, step: int) -> None:
    """Remove what an attempt to write the checkpoint of ``step`` left; what cannot be removed, `begin` finds again."""
    shutil.rmtree(temporary_path(directory, step), ignore_errors=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `commit` was given, once every file is known to be there in its length, and this one unchanged.

    ``ValueError`` if ``checkpoint`` is not a complete checkpoint; `DamagedCheckpoint` if it was one.
    """
    if not (checkpoint / _MARKER).is_file():
        raise ValueError(f"{checkpoint} is not a complete checkpoint (no file {_MARKER}); name a directory step-NNNNNN")
    try:
        marker = _read_object(checkpoint / _MARKER)
        if marker.keys() != {"lengths", "state_crc32"}:
            raise damaged(checkpoint / _MARKER, "it does not list the files")
        for name, length in marker["lengths"].items():
            if (found := (checkpoint / name).stat().st_size) != length:
                raise damaged(checkpoint / name, f"{found} bytes instead of {length}")
        if crc32((checkpoint / _STATE).read_bytes()) != marker["state_crc32"]:
            raise damaged(checkpoint / _STATE, "other bytes than were written: its checksum differs")
        state = _read_object(checkpoint / _STATE)
    except FileNotFoundError as error:
        if not (checkpoint / _MARKER).is_file():  # a removal begins with it
            raise _removed(checkpoint) from None
        raise damaged(Path(error.filename), "it is missing") from None
    except OSError as error:
        raise damaged(Path(error.filename), f"it cannot be read: {error.strerror}") from None
    if not isinstance(state.get("version"), int):
        raise damaged(checkpoint / _STATE, "no version in it")
    return state


def damaged(file: Path, why: str) -> DamagedCheckpoint:
    """The error for a file, or the directory, of a checkpoint."""
    checkpoint = next((path for path in (file, *file.parents) if _NAME.fullmatch(path.name)), file.parent)
    named = _NAME.fullmatch(checkpoint.name)
    earlier = [path.name for step, path in complete(checkpoint.parent).items() if named and step < int(named[1])]
    onwards = f"go on from {earlier[-1]}" if earlier else "begin without it"
    return DamagedCheckpoint(f"{file} is damaged ({why}); restore it, or remove {checkpoint} to {onwards}")


@contextmanager
def pinned(checkpoint: Path) -> Iterator[Path]:
    """A copy of ``checkpoint`` that stays until the context ends, whatever its run removes meanwhile.

    Hard links in a folder beside it: they take no space, and all ranks see them. Files are copied where links cannot be
    made, and to the system's folder for temporary files where nothing can be written beside it. ``ValueError`` if
    ``checkpoint`` is not complete, or is removed too soon; ``OSError`` if there is no room for a copy.
    """
    _remove_left_pins(checkpoint.parent)
    home = _make_pin(checkpoint.parent)
    held = os.open(home, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network file system locks folders; then leftovers stay
            fcntl.flock(held, fcntl.LOCK_EX)
        copy = home / checkpoint.name
        try:
            _link_all(checkpoint, copy)
        except FileNotFoundError:
            raise _removed(checkpoint) from None
        yield copy
    finally:
        shutil.rmtree(home, ignore_errors=True)
        os.close(held)


def prune(directory: Path, *, keep: int, keep_every: int = 0) -> None:
    """Remove all complete checkpoints but the ``keep`` newest and those at multiples of ``keep_every``, if that is > 0.

    ``OSError`` if one of them cannot be removed.
    """
    for step, path in list(complete(directory).items())[:-keep]:
        if not keep_every or step % keep_every:
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


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object. `DamagedCheckpoint` if the file holds something else, ``OSError`` if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise damaged(path, f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise damaged(path, "no JSON object")
    return value


def _removed(checkpoint: Path) -> ValueError:
    return ValueError(f"{checkpoint} is not there, or was removed while it was read")


def _make_pin(beside: Path) -> Path:
    try:
        home = Path(tempfile.mkdtemp(prefix=_PIN_PREFIX, dir=beside))
    except OSError:  # somebody else's, or a disk that nobody can write
        home = Path(tempfile.mkdtemp(prefix=_PIN_PREFIX))
    home.chmod(0o755)  # ranks on a cluster may run as another user
    return home


def _remove_left_pins(directory: Path) -> None:
    """Remove what processes that were killed had pinned: the kernel has let go of their locks."""
    for home in directory.glob(f"{_PIN_PREFIX}*"):
        with suppress(OSError):
            held = os.open(home, os.O_RDONLY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(home)
            finally:
                os.close(held)


def _link_all(checkpoint: Path, copy: Path) -> None:
    """Link every file; ``FileNotFoundError`` if one is removed before it is linked, or was."""
    copy.mkdir()
    marker = checkpoint / _MARKER
    for parent, _, names in os.walk(checkpoint):
        folder = copy / Path(parent).relative_to(checkpoint)
        folder.mkdir(exist_ok=True)
        for name in names:
            if (file := Path(parent, name)) != marker:
                _link(file, folder / name)
    # A removal begins with the marker: while it is there, so was all that came before.
    _link(marker, copy / _MARKER)


def _link(file: Path, link: Path) -> None:
    try:
        os.link(file, link)
    except FileNotFoundError:
        raise
    except OSError:  # another file system, or one without links
        shutil.copyfile(file, link)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
