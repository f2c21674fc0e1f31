"""How a run is, from what lies in its folder: without Ray, and in milliseconds however busy the run.

lock ─────────┐
status.json ──┼─ look ──▶ RunReport ──▶ r2vpo status, logs, stop, resume
summary.json ─┘
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from r2vpo.job import status, summary
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError
from r2vpo.job.status import RunStatus

SILENT_S = 15.0
"""Since the driver of a live run last said anything: then something is wrong with it (seconds)."""

RUNNING = "running"
SILENT = "silent"
"""The driver is there, but has said nothing for `SILENT_S`."""
STARTING = "starting"
"""The driver is there, and has not said anything yet."""
FINISHED = summary.FINISHED
INTERRUPTED = summary.INTERRUPTED
FAILED = summary.FAILED
KILLED = "killed"
"""Nobody runs it, and nobody wrote down an end."""
ALIVE = (RUNNING, SILENT, STARTING)


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A run as its folder shows it at one moment."""

    run: str
    """Its name."""
    path: str
    """Its folder."""
    state: str
    """One of the words above."""
    pid: str | None
    """The process that runs it now."""
    now_s: float
    """The moment (Unix seconds)."""
    status: RunStatus | None
    """What it said last, if anything; of a run that is over, its last words."""
    summary: Mapping[str, Any] | None
    """What it came to, if it wrote that down; of a live run, None."""

    @property
    def is_alive(self) -> bool:
        """Whether somebody runs it now."""
        return self.state in ALIVE

    @property
    def step(self) -> int:
        """Learner steps done, as far as anybody said so."""
        return max(self.status.step if self.status else 0, self.summary["steps"] if self.summary else 0)

    @property
    def error(self) -> str:
        """What went wrong last; empty if nothing did."""
        told = self.summary.get("error", "") if self.summary else ""
        return told or (self.status.last_error if self.status else "")

    def to_json(self) -> dict[str, Any]:
        """As nested mappings and lists."""
        return {
            "run": self.run,
            "path": self.path,
            "state": self.state,
            "alive": self.is_alive,
            "pid": self.pid,
            "now_s": self.now_s,
            "status": self.status and status.to_json(self.status),
            "summary": self.summary,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The report that ``to_json`` gave."""
        fields = {key: value[key] for key in ("run", "path", "state", "pid", "now_s", "summary")}
        return cls(status=value["status"] and status.from_json(value["status"]), **fields)


def look(run: RunDir) -> RunReport:
    """How ``run`` is now. ``ConfigError`` if its files cannot be understood."""
    pid, now_s = run.runner(), time.time()
    said, result = status.read(run.status), _read_summary(run)
    if pid is not None:
        # The files of an earlier start say nothing of this one.
        said = said if said is not None and str(said.pid) == pid else None
        state = STARTING if said is None else RUNNING if now_s - said.updated_s <= SILENT_S else SILENT
        result = None
    else:
        ended = result is not None and result["status"] in (FINISHED, INTERRUPTED, FAILED)
        if ended and said is not None and said.updated_s > run.summary.stat().st_mtime + SILENT_S:
            ended = False  # a later start, killed since
        state = result["status"] if ended and result is not None else KILLED
    return RunReport(run=run.name, path=str(run.path), state=state, pid=pid, now_s=now_s, status=said, summary=result)


def _read_summary(run: RunDir) -> dict[str, Any] | None:
    try:
        result = json.loads(run.summary.read_text(encoding="utf-8"))
        if not {"status", "steps", "wall_s"} <= result.keys():
            raise ValueError("it has no status")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{run.summary} is not a summary of a run ({error}); move it away to go on") from None
    return result
