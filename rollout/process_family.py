"""A process and all that it started: who they are, what they hold, and how they end. Linux, from ``/proc``.

A process group is not enough: a child that calls ``setsid`` leaves it, and one whose parent has ended belongs to
nobody. The guard of a reward therefore adopts orphans, and then everything that a reward started lies below the guard.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Set
from contextlib import suppress

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PAUSE_S = 0.001
"""Between two rounds of killing (seconds): time for those that were hit to be gone."""


def die_with(parent: int, number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, also while foreign code keeps control."""
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it ended before the kernel was told
            os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of every process below this one whose own parent ends."""
    if sys.platform == "linux":
        _prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int, *, without: Set[int] = frozenset(), at_most: int | None = None) -> set[int]:
    """Living processes below ``pid``, or the first ``at_most`` of them: who counts need not see a whole avalanche.

    Those in ``without`` are left out, but not what is below them.
    """
    found: set[int] = set()
    below = _children(pid)
    while below and (at_most is None or len(found) < at_most):
        child = below.pop()
        below += _children(child)
        if child not in without and _is_living(child):
            found.add(child)
    return found


def memory_bytes(pids: Set[int], *, enough: int) -> int:
    """Bytes of memory that the processes hold together, exact where they are more than ``enough``.

    Pages that forked processes share count once. That costs a walk through the page tables, so the cheap sum, which
    counts them in every process, is believed as long as even that is small.
    """
    cheap = sum(_resident_bytes(pid) for pid in pids)
    return cheap if cheap <= enough else sum(_proportional_bytes(pid) for pid in pids)


def kill_descendants(pid: int, *, keep: Set[int] = frozenset(), timeout_s: float) -> None:
    """Kill all processes below ``pid`` but those to keep, and what they start meanwhile, until none lives.

    Ends after ``timeout_s`` seconds at the latest: a process in an uninterruptible system call ends when that returns.
    """
    until_s = time.monotonic() + timeout_s
    while (living := descendants(pid, without=keep)) and time.monotonic() < until_s:
        for one in living:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(one, signal.SIGKILL)
        time.sleep(PAUSE_S)


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _children(pid: int) -> list[int]:
    """Processes that the threads of ``pid`` started, or that it adopted; none if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        tasks = os.listdir(f"/proc/{pid}/task")
        return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]
    return []


def _is_living(pid: int) -> bool:
    """Neither gone nor a zombie, which its parent has yet to look at."""
    state = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return bool(state) and state[0] not in "ZX"


def _resident_bytes(pid: int) -> int:
    pages = _read(f"/proc/{pid}/statm").split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if pages else 0


def _proportional_bytes(pid: int) -> int:
    lines = _read(f"/proc/{pid}/smaps_rollup").splitlines()
    shares = [int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")]
    return sum(shares) if shares else _resident_bytes(pid)


def _read(path: str) -> str:
    """A file of a process; empty if that has ended, or is another user's and keeps it to itself."""
    with suppress(FileNotFoundError, ProcessLookupError, PermissionError), open(path, "rb", buffering=0) as file:
        return file.read().decode(errors="replace")  # a process may call itself anything
    return ""
