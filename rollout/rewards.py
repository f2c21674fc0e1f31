"""Verdicts from processes that can be killed.

    score(items) ──▶ an idle process ──[[response, truth], …]──▶ reward_process.py
                            ◀──[outcome, reward, error] per item──

A verdict streams back as soon as it is there. So when an item hangs or takes its process down, it is known which: it
alone becomes ``timeout`` or ``error``, and a new process goes on with the item after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r2vpo.records import Outcome

START_TIMEOUT_S = 120.0
"""Longest time that importing a reward may take (seconds)."""
GRACE_S = 0.05
"""How long to look once more after a deadline (seconds): an event loop that stood still finds the verdict waiting."""
KILL_TIMEOUT_S = 2.0
"""Longest wait for a killed process to be gone (seconds)."""


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

    def __init__(self, reward: str, *, processes: int, deadline_s: float) -> None:
        """``deadline_s``: seconds one item may take before its process is killed."""
        self._processes = [_RewardProcess(reward, deadline_s) for _ in range(processes)]
        self._idle: asyncio.Queue[_RewardProcess] = asyncio.Queue()
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


class _RewardProcess:
    """One process and the socket to it. Started anew by ``judge`` if it is gone."""

    def __init__(self, reward: str, deadline_s: float) -> None:
        self._reward = reward
        self._deadline_s = deadline_s
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Start it and wait until it has imported the reward."""
        self._loop = asyncio.get_running_loop()
        mine, its = socket.socketpair()
        with its:
            # Must run on a thread that lasts: the process dies with the thread that started it.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rollout.reward_process", self._reward, str(its.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=[its.fileno()],
                start_new_session=True,  # a group of its own: Ctrl-C passes it by, and one kill takes its children too
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self._channel = await asyncio.open_connection(sock=mine)
        greeting = await self._line(START_TIMEOUT_S)
        if not greeting:
            how = f"took longer than {START_TIMEOUT_S:g} s" if greeting is None else f"ended with {self._exit()}"
            self.kill()
            raise RewardPoolFailed(f"task.reward={self._reward}: its process {how} while it imported the reward")
        problem = json.loads(greeting)
        if problem is not None:
            self.kill()
            raise ValueError(problem)

    async def judge(self, items: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """Verdicts of the first items: of all, or up to the one that ended the process."""
        if self._process is None or self._process.poll() is not None:
            self.kill()
            await self.start()
        assert self._channel is not None
        # Not drained: a process that does not read is found by the deadline of the first verdict.
        self._channel[1].write(json.dumps(items).encode() + b"\n")
        verdicts: list[Verdict] = []
        for _ in items:
            line = await self._line(self._deadline_s)
            if not line:
                verdicts.append(self._end(line))
                break
            outcome, reward, error = json.loads(line)
            verdicts.append(Verdict(outcome=Outcome(outcome), reward=reward, error=error))
        return verdicts

    def kill(self) -> None:
        """Kill the process with all it started, and forget it."""
        process, self._process = self._process, None
        channel, self._channel = self._channel, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KILL_TIMEOUT_S)
        if channel is not None and self._loop is not None and not self._loop.is_closed():
            channel[1].close()

    def _end(self, line: bytes | None) -> Verdict:
        """The verdict on an item for which no line came in time, or none will come."""
        if line is None:
            verdict = Verdict(outcome=Outcome.TIMEOUT, error=f"no verdict within {self._deadline_s:g} s")
        else:
            verdict = Verdict(outcome=Outcome.ERROR, error=f"the reward ended its process with {self._exit()}")
        self.kill()
        return verdict

    async def _line(self, timeout_s: float) -> bytes | None:
        """The next line; empty if the process has ended, None if nothing came in time."""
        if self._channel is None:  # closed meanwhile
            return b""
        for seconds in (timeout_s, GRACE_S):
            with contextlib.suppress(TimeoutError):
                try:
                    async with asyncio.timeout(seconds):
                        line = await self._channel[0].readline()
                except ConnectionError:
                    return b""
                return line if line.endswith(b"\n") else b""
        return None

    def _exit(self) -> str:
        """How the process ended, for people."""
        if self._process is None:
            return "the pool"
        try:
            code = self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "a closed channel"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
