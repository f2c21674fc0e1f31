"""Rewards that behave and misbehave; what a response asks for is done to its process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from fractions import Fraction

LENGTH = 3
"""Not a function."""


def score(response: str, truth):
    """1 or 0; or, for a response that names a misdeed, the misdeed."""
    deeds = {
        "hang": lambda: time.sleep(1000),
        "exit": lambda: os._exit(3),
        "sys.exit": lambda: sys.exit(4),
        "segfault": lambda: os.kill(os.getpid(), 11),
        "raise": lambda: 1 / 0,
        "none": lambda: None,
        "nan": lambda: float("nan"),
        "inf": lambda: float("inf"),
        "huge": lambda: 10**400,
        "text": lambda: "1.0",
        "true": lambda: True,
        "half": lambda: Fraction(1, 2),
        "print": chatter,
        "children": leave_a_child,
        "pid": os.getpid,
    }
    return deeds[response]() if response in deeds else float(response == truth)


def is_same(response: str, truth) -> float:
    """1 if the response is the truth as JSON."""
    return float(json.loads(response) == truth)


def slow(response: str, truth) -> float:
    """1, after 0.3 s."""
    time.sleep(0.3)
    return 1.0


def chatter() -> float:
    """Writes everywhere a reward may write, and reads where it may read."""
    print('["scored", 99.0, ""]', flush=True)
    print('["scored", 99.0, ""]', file=sys.stderr, flush=True)
    os.write(1, b"raw\n")
    subprocess.run(["echo", "from a child"], check=True)
    assert sys.stdin.read() == ""
    return 1.0


def leave_a_child() -> float:
    """Starts a process that would outlive everything, and returns its number."""
    return subprocess.Popen(["sleep", "1000"]).pid
