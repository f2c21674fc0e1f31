"""The process in which a reward runs: ``python -m rollout.reward_process module:function DESCRIPTOR PARENT``.

It speaks JSON lines over a socket that it inherits, so nothing that a reward prints or reads can disturb it. First it
says ``null``, or in a string why the reward cannot be found. Then it is sent lists ``[[response, truth], …]`` and
answers every item, as soon as it has its verdict, by ``[outcome, reward, error]``. It ends when the socket does, and
dies with the process PARENT. Only the standard library is imported here, besides what the reward itself imports.
"""

from __future__ import annotations

import ctypes
import json
import math
import numbers
import os
import signal
import socket
import sys
from typing import Any

from rollout.tasks.base import RewardFunction, resolve_reward

ERROR_CHARACTERS = 500
"""Longest text of an error that is sent back."""
PR_SET_PDEATHSIG = 1


def main(reward: str, descriptor: int, parent: int) -> None:
    """Serve until the socket ends."""
    _die_with(parent)
    channel = socket.socket(fileno=descriptor)
    try:
        function = resolve_reward(reward)
    except ValueError as error:
        _send(channel, str(error)[:ERROR_CHARACTERS])
        return
    _send(channel, None)
    with channel.makefile("rb") as lines:
        for line in lines:
            for response, truth in json.loads(line):
                _send(channel, judge(function, response, truth))


def judge(function: RewardFunction, response: str, truth: Any) -> tuple[str, float | None, str]:
    """Outcome, reward and, for people, why there is none."""
    try:
        value = function(response, truth)
    except Exception as error:  # noqa: BLE001 - the fault boundary: whatever a reward raises is one item's outcome
        return "error", None, f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
    if value is None:
        return "no_verdict", None, ""
    if not isinstance(value, numbers.Real):
        return "no_verdict", None, f"the reward returned a {type(value).__name__}, not a number"
    try:
        reward = float(value)
    except OverflowError:
        reward = math.inf
    if not math.isfinite(reward):
        return "no_verdict", None, f"the reward returned {reward}, which is not finite"
    return "scored", reward, ""


def _send(channel: socket.socket, message: Any) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when the parent ends, also where a reward never gives control back."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel was told
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
