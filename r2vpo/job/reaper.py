"""Ends what a dead driver leaves behind, and says so: ``python -m r2vpo.job.reaper DRIVER LOGS LOOK_S GRACE_S``.

Most of a job dies with its driver, because the kernel or Ray sees to it; the rest takes a minute (Ray's agents), or
hangs in a library. So this process looks at the driver's descendants while there is a driver. Standard input closes
when there is none any more, and then whatever is left has a few seconds. Ray, too, can end a driver without a word.

Processes are held by descriptors, not by numbers, which the system gives away again. Linux only.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

LOOK_S = 2.0
"""Between two looks at the driver's descendants (seconds)."""
GRACE_S = 8.0
"""For what is left to end by itself (seconds)."""
FAREWELL = b"."
"""What a driver says that ends as it should."""
PROC = Path("/proc")


class Reaper:
    """The process, as the driver starts it. It ends after the driver, or after ``close``."""

    def __init__(self, logs: Path, *, look_s: float = LOOK_S, grace_s: float = GRACE_S) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "r2vpo.job.reaper", str(os.getpid()), str(logs), str(look_s), str(grace_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C or a kill of the driver's group passes it by
        )

    def close(self) -> None:
        """Everything has been ended: nothing is waited for, nothing is to be said."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(FAREWELL)
            self._process.stdin.close()


def main(driver: int, logs: str, look_s: float, grace_s: float) -> None:
    """Look at the descendants of ``driver`` until standard input closes, then end what is left of them."""
    held: dict[int, int] = {}
    while not select.select([sys.stdin], [], [], look_s)[0]:
        for process in _ended(held):
            os.close(held.pop(process))
        for process in descendants(driver) - held.keys() - {os.getpid()}:
            with suppress(ProcessLookupError):
                held[process] = os.pidfd_open(process)
    if not os.read(sys.stdin.fileno(), 1):
        print(
            f"r2vpo: error: the driver (process {driver}) was killed, or ended by Ray; ending what is left of the run; "
            f"see {logs}",
            file=sys.stderr,
            flush=True,
        )
    until_s = time.monotonic() + grace_s
    while time.monotonic() < until_s and len(_ended(held)) < len(held):
        time.sleep(0.1)
    for descriptor in held.values():
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)


def descendants(ancestor: int) -> set[int]:
    """Numbers of the processes below ``ancestor``."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                # The name before the last parenthesis may hold anything; then come the state and the parent.
                parent = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(entry.name))
    found, open_ends = set[int](), [ancestor]
    while open_ends:
        below = children.get(open_ends.pop(), [])
        found.update(below)
        open_ends += below
    return found


def _ended(held: dict[int, int]) -> set[int]:
    """Those of the processes (number → descriptor) that are over: their descriptor is readable."""
    poll = select.poll()
    for descriptor in held.values():
        poll.register(descriptor, select.POLLIN)
    over = {descriptor for descriptor, _ in poll.poll(0)}
    return {process for process, descriptor in held.items() if descriptor in over}


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
