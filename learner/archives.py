"""Bytes of a checkpoint that are not those that were written.

torch writes its files as zip archives, in which every tensor has a checksum, and reads them without a look at these: a
byte that a disk or a network has changed would become another weight, in silence.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from learner.checkpoint import damaged


def check_archives(directory: Path, *, rank: int, world_size: int) -> None:
    """Read the part of the files below ``directory`` that falls to ``rank``: all of them are read once by all ranks.

    `DamagedCheckpoint` if the bytes of one do not match its checksums.
    """
    for file in sorted(directory.rglob("*.pt"))[rank::world_size]:
        try:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
            raise damaged(file, f"{type(error).__name__}: {error}") from error
        if bad is not None:
            raise damaged(file, f"the bytes of {bad} do not match their checksum")
