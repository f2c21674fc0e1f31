"""What is seen of a run from outside: its status, what it prints, its steps."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from typing import Any

from tests.faults.victims import Run

LOOK_S = 0.05
LIMIT_S = 300.0
"""Longest wait for anything that must come (seconds)."""


class Late(Exception):  # noqa: N818 - says what happened
    """What must come has not come."""


def status(run: Run, *, role: str) -> list[dict[str, Any]]:
    """Lines of ``r2vpo status``: the components of a role, as they were a second ago; none before there are any."""
    file = run.folder / "status.json"
    if not file.exists():
        return []
    return [component for component in json.loads(file.read_text())["components"] if component["role"] == role]


def await_that(run: Run, what: str, holds: Callable[[], bool]) -> float:
    """Return once it holds, or the run has ended; with the time at which that was seen (Unix time, seconds)."""
    until_s = time.monotonic() + LIMIT_S
    while not holds() and run.exit_code is None:
        if time.monotonic() > until_s:
            raise Late(f"no {what} within {LIMIT_S:g} s; the run has said: {run.printed()[-2000:]}")
        time.sleep(LOOK_S)
    return time.time()


def await_printed(run: Run, pattern: str, *, since: int = 0) -> float:
    """Return once the run has printed it after its first ``since`` characters."""
    return await_that(run, pattern, lambda: re.search(pattern, run.printed()[since:]) is not None)


def await_more_steps(run: Run, count: int) -> None:
    """Return once the learner has made so many steps from now on."""
    times = _Changes(lambda: run.steps()[-1:])
    await_that(run, f"{count} more steps", lambda: times.seen() >= count)


class _Changes:
    """Counts how often something has changed: steps are counted anew when a learner goes back."""

    def __init__(self, look: Callable[[], object]) -> None:
        self._look, self._last, self._count = look, look(), 0

    def seen(self) -> int:
        now = self._look()
        self._count += now != self._last
        self._last = now
        return self._count
