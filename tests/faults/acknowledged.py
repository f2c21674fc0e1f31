"""Which groups a run's workers had an acknowledgement for: a record that owes nothing to the store.

A worker says ``acknowledged KEY`` at level DEBUG once an append has returned. In the environment of `recording` every
Python process of a run writes that to its own log file as it happens, so that a kill leaves what was said before it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

_CUSTOMIZE = """\
import logging
import os
import sys

if "ENGINE_PROCESS" in os.environ:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # set to 0 by now where it matters
_handler = logging.StreamHandler(sys.stderr)
_handler.setFormatter(logging.Formatter("%(message)s"))
_logger = logging.getLogger("rollout.worker")
_logger.addHandler(_handler)
_logger.setLevel(logging.DEBUG)
"""
_LINE = re.compile(r"^acknowledged (\d+\.\d+)\n", re.MULTILINE)


def recording(folder: Path, *, engine_process: bool = False) -> dict[str, str]:
    """The environment for a run whose workers are to write down what was acknowledged; ``folder`` is for a file of it.

    With ``engine_process`` engines have a process of their own, as on a GPU.

    Python runs a module ``sitecustomize`` whenever it starts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_CUSTOMIZE)
    own = {"ENGINE_PROCESS": "1"} if engine_process else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]), **own}


def acknowledged(logs: Path) -> list[str]:
    """Keys in the logs of all workers (RUN/logs), each once, in no particular order; half a last line counts not."""
    return sorted({key for log in logs.glob("rollout-*.log") for key in _LINE.findall(log.read_text(errors="replace"))})


def write_record(logs: Path, file: Path) -> Path:
    """The keys as ``r2vpo replay verify --deep RUN --acknowledged FILE`` takes them."""
    file.write_text("".join(f"{key}\n" for key in acknowledged(logs)))
    return file
