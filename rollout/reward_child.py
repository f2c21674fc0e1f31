"""The process of a reward as its guard sees it: started, asked, listened to, and ended."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import suppress

READ_BYTES = 2**16
LONGEST_ANSWER = 2**14
"""Bytes; the longest error text fits with room to spare. What is longer is no answer."""


class RewardChild:
    """One process in a session of its own. ``closed`` and ``status`` say that it will not answer any more."""

    def __init__(self, reward: str, *, memory_mb: int) -> None:
        self.channel, its = socket.socketpair()
        self.channel.setblocking(False)
        self.output, its_output = os.pipe()
        os.set_blocking(self.output, False)
        os.set_inheritable(its.fileno(), True)
        arguments = [reward, str(its.fileno()), str(os.getpid()), str(memory_mb)]
        self.pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "rollout.reward_process", *arguments],
            os.environ,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, its_output, 1),
                (os.POSIX_SPAWN_DUP2, its_output, 2),
            ],
            setsid=True,
        )
        its.close()
        os.close(its_output)
        self.status: int | None = None
        """Exit status as ``os.waitpid`` gives it, once it has ended."""
        self.closed = False
        """The channel has ended."""
        self.has_output = True
        """The pipe of its output has not ended."""
        self._question = b""
        self._answer = b""

    def ask(self, question: bytes) -> None:
        """Have a line written: at once as far as the channel takes it, and the rest as the process reads."""
        self._question = question + b"\n"
        self.write()

    @property
    def wants_to_write(self) -> bool:
        """Part of the question is still here."""
        return bool(self._question) and not self.closed

    def write(self) -> None:
        """Send what the channel takes."""
        try:
            self._question = self._question[self.channel.send(self._question) :]
        except BlockingIOError:
            return
        except OSError:
            self.closed = True

    def read(self) -> None:
        """Take what the channel has."""
        with suppress(BlockingIOError):
            try:
                data = self.channel.recv(READ_BYTES)
            except ConnectionError:
                data = b""
            self._answer += data
            self.closed = self.closed or not data

    def read_output(self) -> bytes:
        """What it and its children printed; empty at the moment, or for ever."""
        try:
            data = os.read(self.output, READ_BYTES)
        except BlockingIOError:
            return b""
        self.has_output = bool(data)
        return data

    @property
    def has_answer(self) -> bool:
        """A line is here, or something too long to become one."""
        return b"\n" in self._answer or len(self._answer) > LONGEST_ANSWER

    def take_answer(self) -> bytes | None:
        """The line that came, or what came instead of a line; None if it is not complete."""
        if not self.has_answer:
            return None
        answer, self._answer = self._answer, b""
        return answer

    def is_idle(self) -> bool:
        """Alive, and silent since its last answer."""
        self.read()
        return self.status is None and not self.closed and not self._answer

    def how_it_ended(self) -> str:
        """For people: the exit code or signal."""
        if self.status is None:
            return "a closed channel"
        code = os.waitstatus_to_exitcode(self.status)
        if code >= 0:
            return f"exit code {code}"
        known = {number.value: number.name for number in signal.Signals}
        return f"signal {known.get(-code, -code)}"

    def kill(self) -> None:
        """Kill it and its process group in one instant, which no fork outruns."""
        if self.status is None:  # otherwise its number may be another's
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close what leads to it."""
        self.channel.close()
        os.close(self.output)
