"""Verdicts from processes that can be killed.

    score(items) ──▶ an idle guard ──[[response, truth], …]──▶ reward_guard.py ──▶ reward_process.py
                          ◀──["verdict", outcome, reward, error] per item──

The guard answers every item, whatever becomes of the reward that it watches. What is here starts the guards, shares the
work among them, and goes on with a new one should a reward manage to kill its guard.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r2vpo.records import Outcome
from rollout.reward_guard import START_TIMEOUT_S

LATE_S = 30.0
"""How much later than its deadlines a guard may answer before it is taken for dead (seconds)."""
KILL_TIMEOUT_S = 2.0
"""Longest wait for a guard to have ended everything below it (seconds)."""


class RewardPoolFailed(RuntimeError):  # noqa: N818 - says what happened
    """The pool cannot judge: it was closed, or its processes do not start any more."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a reward said about one response."""

    outcome: Outcome
    """``scored``, ``no_verdict``, ``timeout`` or ``error``."""
    reward: float | None = None
    """A finite number where the outcome is ``scored``, otherwise None."""
    error: str = ""
    """Why there is no reward, for people."""


class RewardPool:
    """Judges responses in ``processes`` processes that each import the reward ``module:function`` once."""

    def __init__(self, reward: str, *, processes: int, deadline_s: float, memory_mb: int) -> None:
        """``deadline_s``: seconds one item may take. ``memory_mb``: MiB one process and all it starts may hold."""
        self._processes = [_GuardedProcess(reward, deadline_s, memory_mb) for _ in range(processes)]
        self._idle: asyncio.Queue[_GuardedProcess] = asyncio.Queue()
        self._is_closed = False

    async def start(self) -> None:
        """Start the processes.

        ``ValueError`` if the reward does not exist, ``RewardPoolFailed`` if a process ends or hangs while importing it.
        """
        try:
            await asyncio.gather(*(process.start() for process in self._processes))
        except BaseException:
            self.close()
            raise
        for process in self._processes:
            self._idle.put_nowait(process)

    async def score(self, items: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """One verdict per ``(response, truth)``, in order; the truth is a JSON value. Waits for an idle process."""
        process = await self._idle.get()
        verdicts: list[Verdict] = []
        try:
            while len(verdicts) < len(items):
                self._check_open()
                verdicts += await process.judge(items[len(verdicts) :])
                self._check_open()
        finally:
            if len(verdicts) < len(items):
                process.kill()  # what it would still say belongs to no one
            self._idle.put_nowait(process)
        return verdicts

    def close(self) -> None:
        """Kill all processes and what they started. May be called again, and from anywhere."""
        self._is_closed = True
        for process in self._processes:
            process.kill()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RewardPoolFailed("the reward pool is closed")


class _GuardedProcess:
    """One guard and the socket to it. Started anew by ``judge`` if it is gone."""

    def __init__(self, reward: str, deadline_s: float, memory_mb: int) -> None:
        self._reward = reward
        self._deadline_s = deadline_s
        self._memory_mb = memory_mb
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Start it and wait until its reward is imported."""
        self._loop = asyncio.get_running_loop()
        mine, its = socket.socketpair()
        arguments = [self._reward, str(self._deadline_s), str(self._memory_mb), str(its.fileno()), str(os.getpid())]
        with its:
            # Must run on a thread that lasts: the guard ends with the thread that started it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout.reward_guard", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[its.fileno()],
                start_new_session=True,  # Ctrl-C passes it by
                env=_environment(),
            )
        self._channel = await asyncio.open_connection(sock=mine)
        match await self._message(START_TIMEOUT_S + LATE_S):
            case ["ready"]:
                return
            case ["refused", str(why)]:
                self.kill()
                raise ValueError(why)
            case ["failed", str(why)]:
                self.kill()
                raise RewardPoolFailed(why)
            case _:
                self.kill()
                raise RewardPoolFailed(f"task.reward={self._reward}: the guard of its process ended at its start")

    async def judge(self, items: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """Verdicts of the first items: of all, or up to the one that ended the guard."""
        if self._process is None or self._process.poll() is not None:
            self.kill()
            await self.start()
        assert self._channel is not None
        # Not drained: a guard that does not read is found by the deadline of the first verdict.
        self._channel[1].write(json.dumps(items).encode() + b"\n")
        verdicts: list[Verdict] = []
        for _ in items:
            match await self._message(self._deadline_s + START_TIMEOUT_S + LATE_S):  # a restart may precede an item
                case ["verdict", outcome, reward, error]:
                    verdicts.append(Verdict(outcome=Outcome(outcome), reward=reward, error=error))
                case ["failed" | "refused", str(why)]:
                    raise RewardPoolFailed(why)
                case _:
                    self.kill()
                    verdicts.append(Verdict(outcome=Outcome.ERROR, error="the reward ended the guard of its process"))
                    break
        return verdicts

    def kill(self) -> None:
        """End the guard with the reward and all it started, and forget it."""
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if process is not None:
            process.terminate()
            try:
                process.wait(KILL_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
        if channel is not None and self._loop is not None and not self._loop.is_closed():
            channel[1].close()

    async def _message(self, timeout_s: float) -> list[Any] | None:
        """The next message of the guard; None if it has ended, or said nothing in time."""
        if self._channel is None:  # closed meanwhile
            return None
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(timeout_s):
                line = await self._channel[0].readline()
            return json.loads(line) if line.endswith(b"\n") else None
        return None


def _environment() -> dict[str, str]:
    """Variables of the reward's processes: they find the same modules, and cannot give work to the Ray cluster."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_TOKEN")}
    return own | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
