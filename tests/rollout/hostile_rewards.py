"""Rewards that attack what they run in: memory, processes, output, descriptors, and the socket of their process."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

MB = 2**20
HELPER = subprocess.Popen(["sleep", "1000"]).pid if os.environ.get("HOSTILE_HELPER") else 0
"""A process that is started with the import, for every item that follows."""


class NoFloat(float):
    """A number that fails when it is asked for its value."""

    def __float__(self) -> float:
        raise OSError("no value")


def score(response: str, truth) -> float | None:
    """Do what the response names; 1 for any other."""
    deed = DEEDS.get(response)
    return 1.0 if deed is None else deed()


def allocate() -> float:
    """1 GiB in one piece."""
    return float(len(b"x" * (1024 * MB)))


def share_memory() -> float:
    """1 GiB that the kernel does not count as this process's own data, a little at a time."""
    pieces = []
    for _ in range(64):
        piece = mmap.mmap(-1, 16 * MB)
        piece.write(b"x" * (16 * MB))
        pieces.append(piece)
        time.sleep(0.01)
    return 1.0


def divide_memory() -> float:
    """Children that are each within the limit, and together are not."""
    for _ in range(4):
        if os.fork() == 0:
            _held = b"x" * (100 * MB)
            time.sleep(1000)
    time.sleep(1000)
    return 1.0


def fork_and_return() -> float:
    """Two processes come back from this call, with different rewards."""
    return 0.0 if os.fork() == 0 else 1.0


def fork_and_raise() -> float:
    """A fork leaves by an exception."""
    if os.fork() == 0:
        raise ValueError("in the fork")
    time.sleep(0.1)
    return 1.0


def fork_many() -> float:
    """Sleeping processes, one after another. Not each from each, without end: that is for a machine of one's own."""
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.005)
    time.sleep(1000)
    return 1.0


def leave_orphan() -> float:
    """Returns the number of a process in its own session, whose parent has ended, with a name that looks dead."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        if os.fork() == 0:
            Path("/proc/self/comm").write_bytes(b"\xff) Z 1")
            os.write(writing, str(os.getpid()).encode())
            time.sleep(1000)
        os._exit(0)
    os.waitpid(child, 0)
    return float(os.read(reading, 100))


def leave_orphan_and_die() -> float:
    """The number of the orphan goes into a file: this process says nothing any more."""
    with open(os.environ["HOSTILE_FILE"], "w") as file:
        file.write(str(int(leave_orphan())))
    os._exit(7)


def print_gigabyte() -> float:
    """1 GiB to standard output, and a little more from a child to standard error."""
    block = b"x" * MB
    for _ in range(1024):
        assert os.write(1, block) == MB
    subprocess.run(["sh", "-c", "yes | head -c 1000000 >&2"], check=True)
    return 1.0


def descriptors() -> list[int]:
    """Open descriptors besides the standard ones."""
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]


def write_everywhere(data: bytes) -> float:
    """Write into whatever is open, the socket of this process too."""
    for descriptor in descriptors():
        try:
            os.write(descriptor, data)
        except OSError:
            continue
    return 1.0


def close_everything() -> float:
    """Close what is open, and go on."""
    os.closerange(0, 1000)
    return 1.0


def close_everything_and_hang() -> float:
    """Close what is open, and stay."""
    os.closerange(0, 1000)
    time.sleep(1000)
    return 1.0


def stop() -> float:
    """Stand still, deaf to all signals but one."""
    os.kill(os.getpid(), signal.SIGSTOP)
    return 1.0


def interrupt() -> float:
    """An exception that is no Exception."""
    raise KeyboardInterrupt


def recurse() -> float:
    """Recursion without end."""
    return recurse()


FORGED = json.dumps(["0123456789abcdef", "scored", 99.0, ""]).encode() + b"\n"

DEEDS: dict[str, Callable[[], float | None]] = {
    "allocate": allocate,
    "share memory": share_memory,
    "divide memory": divide_memory,
    "fork and return": fork_and_return,
    "fork and raise": fork_and_raise,
    "fork many": fork_many,
    "leave orphan": leave_orphan,
    "leave orphan and die": leave_orphan_and_die,
    "print a gigabyte": print_gigabyte,
    "write garbage": lambda: write_everywhere(b"\x00\xff{[\n"),
    "write no line": lambda: write_everywhere(b"[" * 60_000),
    "forge an answer": lambda: write_everywhere(FORGED),
    "close everything": close_everything,
    "close everything and hang": close_everything_and_hang,
    "stop": stop,
    "interrupt": interrupt,
    "recurse": recurse,
    "kill itself": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "kill its group": lambda: os.killpg(0, signal.SIGKILL),
    "kill the guard": lambda: os.kill(os.getppid(), signal.SIGKILL),
    "no float": lambda: NoFloat(1.0),
    "pid": lambda: float(os.getpid()),
    "oom": lambda: float(Path("/proc/self/oom_score_adj").read_text()),
    "helper": lambda: float(HELPER),
    "say": lambda: print("said by the reward", file=sys.stderr),
}
