"""Environment variables on their way to a job's driver, so that no file and no log on the way can be read for them.

    submit ──sealed text──▶ the job's environment, which Ray writes into its own logs ──┐
           └─pad──────────▶ a file that travels with the code ──────────────────────────┴──▶ driver's environment

The pad is as long as the text and random, so either alone says nothing. Together they are read by whoever may read the
files of the cluster's user, who could also look at the driver itself.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "R2VPO_SEALED"
FOLDER = "r2vpo_pad"


def seal(variables: Mapping[str, str], folder: Path) -> tuple[dict[str, str], list[Path]]:
    """What the job's environment is to hold, and the folders in ``folder`` that must travel; empty if nothing must."""
    if not variables:
        return {}, []
    text = json.dumps(dict(variables)).encode()
    pad = secrets.token_bytes(len(text))
    home = folder / FOLDER
    home.mkdir()
    (home / "pad").write_bytes(pad)
    return {VARIABLE: base64.b64encode(_xor(text, pad)).decode()}, [home]


def unseal() -> dict[str, str]:
    """The variables that were sealed for this process; what was sealed leaves its environment."""
    sealed = os.environ.pop(VARIABLE, None)
    if sealed is None:
        return {}
    pad = next(Path(entry, FOLDER, "pad") for entry in sys.path if Path(entry, FOLDER, "pad").is_file())
    return json.loads(_xor(base64.b64decode(sealed), pad.read_bytes()))


def _xor(text: bytes, pad: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(text, pad, strict=True))
