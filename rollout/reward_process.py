"""The process in which a reward runs: ``python -m rollout.reward_process module:function DESCRIPTOR PARENT MEMORY_MB``.

Its guard (``reward_guard.py``) speaks JSON lines with it over a socket that it inherits, so nothing that a reward
prints or reads can disturb that. First it says ``["ready"]``, or ``["refused", why]`` if the reward cannot be found.
Then it answers every ``[nonce, response, truth]`` by ``[nonce, outcome, reward, error]``: what was written blindly into
the socket is no answer. It ends when the socket does, and dies with its guard. Only the standard library is imported
here, besides what the reward itself imports.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from rollout.process_family import die_with
from rollout.tasks.base import RewardFunction, resolve_reward

ERROR_CHARACTERS = 500
"""Longest text of an error that is sent back."""


def main(reward: str, descriptor: int, parent: int, memory_mb: int) -> None:
    """Serve until the socket ends."""
    die_with(parent, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a reward that crashes all day would fill the disk
    _die_first()
    os.set_inheritable(descriptor, False)
    channel = socket.socket(fileno=descriptor)
    try:
        function = resolve_reward(reward)
    except ValueError as error:
        _send(channel, ["refused", str(error)[:ERROR_CHARACTERS]])
        return
    _bound_memory(memory_mb)
    _send(channel, ["ready"])
    itself = os.getpid()
    with channel.makefile("rb") as lines:
        for line in lines:
            nonce, response, truth = json.loads(line)
            answer = judge(function, response, truth)
            if os.getpid() != itself:
                os._exit(0)  # a fork that came back from the reward must not answer, nor take the next question
            _send(channel, [nonce, *answer])


def judge(function: RewardFunction, response: str, truth: Any) -> tuple[str, float | None, str]:
    """Outcome, reward and, for people, why there is none."""
    try:
        return _verdict(function(response, truth))
    except Exception as error:  # noqa: BLE001 - the fault boundary: whatever a reward raises is one item's outcome
        return "error", None, f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]


def _verdict(value: Any) -> tuple[str, float | None, str]:
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


def _bound_memory(memory_mb: int) -> None:
    """Let the kernel refuse what is beyond ``memory_mb`` MiB more than the import took: the reward gets a MemoryError.

    Of the limits there are, RLIMIT_DATA is the one that counts what is private and writable, and neither files nor the
    address space that numpy and allocators reserve without using it. The guard watches the sum over all processes.
    """
    with suppress(FileNotFoundError):
        pages = int(Path("/proc/self/statm").read_text().split()[5])
        limit = pages * os.sysconf("SC_PAGE_SIZE") + memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _die_first() -> None:
    """Where memory runs out all the same, have the kernel take this process and its children before anyone else."""
    with suppress(FileNotFoundError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _send(channel: socket.socket, message: list[Any]) -> None:
    channel.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
