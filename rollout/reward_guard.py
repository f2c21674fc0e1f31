"""Stands between the pool and a reward: ``python -m rollout.reward_guard`` with the arguments of ``main``.

    RewardPool ──[[response, truth], …]──▶ guard ──[nonce, response, truth]──▶ reward_process.py
               ◀──["verdict", …] per item──      ◀──[nonce, outcome, …]──────  and whatever it starts

The pool lives in a process with an engine, which must not adopt, wait for or look after strangers; the guard has
nothing else to do. It answers every item, whatever becomes of the process of the reward: a new one is started after an
item that hangs, ends it, takes too much memory or talks nonsense. Processes that a call leaves behind are killed with
its end; those started while the reward was imported may stay. First it says ``["ready"]``, ``["refused", why]`` if the
reward does not exist, or, then and after any restart, ``["failed", why]`` before it ends. It ends with the pool, and
everything below it ends with it.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any, NoReturn

from rollout.bounded_output import BoundedOutput
from rollout.process_family import adopt_orphans, descendants, die_with, kill_descendants, memory_bytes
from rollout.reward_child import RewardChild
from rollout.reward_process import ERROR_CHARACTERS

START_TIMEOUT_S = 120.0
"""Longest time that importing a reward may take (seconds)."""
TICK_S = 0.1
"""Time between two looks at memory and number of processes (seconds)."""
EXIT_TIMEOUT_S = 1.0
"""Longest wait for the exit code of a process that closed its channel, and for killed ones to be gone (seconds)."""
MAX_PROCESSES = 64
"""Most processes that a reward may have at a time. Counted once a tick: against processes that double without end only
a limit of the kernel holds, such as the container's."""

Answer = tuple[str, float | None, str]
"""Outcome, reward, and why there is none."""


class RewardGuard:
    """One reward process after another, one item at a time. Construct it once: it takes the process's signals."""

    def __init__(self, reward: str, *, deadline_s: float, memory_mb: int, pool: socket.socket) -> None:
        self._reward = reward
        self._deadline_s = deadline_s
        self._memory_mb = memory_mb
        self._pool = pool
        self._questions = b""
        self._output = BoundedOutput(2)
        self._child: RewardChild | None = None
        self._helpers: set[int] = set()
        self._next_look_s = 0.0
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler there is no wake-up

    def serve(self) -> NoReturn:
        """Answer batches. Raises ``SystemExit`` when the pool has ended, or when the reward does not start any more."""
        child = self._start()
        self._say("ready")
        while True:
            while b"\n" not in self._questions:
                self._turn(TICK_S)
            line, _, self._questions = self._questions.partition(b"\n")
            for response, truth in json.loads(line):
                if not child.is_idle():  # after its last answer it ended, or spoke without being asked
                    self._end(child)
                    child = self._start()
                answer = self._judge(child, response, truth)
                self._say("verdict", *answer)
                if self._child is None:
                    child = self._start()

    def close(self) -> None:
        """End everything below this process."""
        if self._child is not None:
            self._child.kill()
        kill_descendants(os.getpid(), timeout_s=EXIT_TIMEOUT_S)

    def _start(self) -> RewardChild:
        """A new process that has imported the reward; or the end of the guard, with the reason."""
        child = self._child = RewardChild(self._reward, memory_mb=self._memory_mb)
        self._helpers = set()
        until_s = time.monotonic() + START_TIMEOUT_S
        while (line := child.take_answer()) is None:
            problem = self._problem(child)
            if problem is None and time.monotonic() >= until_s:
                problem = f"took longer than {START_TIMEOUT_S:g} s"
            if problem is not None:
                self._fail("failed", f"task.reward={self._reward}: its process {problem} while it imported the reward")
            self._turn(TICK_S)
        match parsed(line):
            case ["ready"]:
                self._helpers = descendants(os.getpid(), without={child.pid})
                return child
            case ["refused", str(why)]:
                self._fail("refused", why)
            case _:
                self._fail("failed", f"task.reward={self._reward}: its module writes to the socket of its process")

    def _judge(self, child: RewardChild, response: str, truth: Any) -> Answer:
        """The verdict on one item. A child that cannot go on afterwards has been ended."""
        nonce = secrets.token_hex(8)
        child.ask(json.dumps([nonce, response, truth]).encode())
        self._output.next_item()
        until_s = time.monotonic() + self._deadline_s
        while (line := child.take_answer()) is None:
            problem = self._problem(child)
            if problem is not None:
                self._end(child)
                return "error", None, f"the reward's process {problem}"
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                self._end(child)
                return "timeout", None, f"no verdict within {self._deadline_s:g} s"
            self._turn(min(TICK_S, left_s))
        answer = answer_in(line, nonce)
        if answer is None:
            self._end(child)
            return "error", None, "the reward wrote to the socket of its process"
        kill_descendants(os.getpid(), keep=self._helpers | {child.pid}, timeout_s=EXIT_TIMEOUT_S)
        return answer

    def _problem(self, child: RewardChild) -> str | None:
        """Why the child will not answer, or must not go on; looks at memory at most once a tick."""
        if child.closed or child.status is not None:
            until_s = time.monotonic() + EXIT_TIMEOUT_S
            while child.status is None and time.monotonic() < until_s:
                self._turn(TICK_S)
            child.read()  # it may have answered before it ended
            return None if child.has_answer else f"ended with {child.how_it_ended()}"
        if time.monotonic() < self._next_look_s:
            return None
        self._next_look_s = time.monotonic() + TICK_S
        below = descendants(os.getpid(), at_most=MAX_PROCESSES + 1)
        if len(below) > MAX_PROCESSES:
            return f"started more than {MAX_PROCESSES} processes"
        if memory_bytes(below, enough=self._memory_mb * 2**20) > self._memory_mb * 2**20:
            return f"and what it started hold more than task.reward_memory_mb={self._memory_mb} MiB of memory"
        return None

    def _turn(self, timeout_s: float) -> None:
        """Wait until something comes or goes, or for the timeout, and take it in."""
        child = self._child
        read: list[socket.socket | int] = [self._pool, self._woken]
        write: list[socket.socket] = []
        if child is not None:
            read += [child.output] if child.has_output else []
            read += [] if child.closed else [child.channel]
            write += [child.channel] if child.wants_to_write else []
        readable, writable, _ = select.select(read, write, [], timeout_s)
        if self._pool in readable:
            self._hear()
        if self._woken in readable:
            self._reap()
        if child is not None:
            if child.output in readable:
                self._output.write(child.read_output())
            if child.channel in readable:
                child.read()
            if writable:
                child.write()

    def _reap(self) -> None:
        """Look at the children that have ended, the adopted ones too."""
        with suppress(BlockingIOError):
            self._woken.recv(2**12)
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if self._child is not None and ended[0] == self._child.pid:
                    self._child.status = ended[1]

    def _end(self, child: RewardChild) -> None:
        """Kill the child and all it started, and pass on its last words."""
        self.close()
        self._reap()
        while data := child.read_output():  # ends: no one is left who writes
            self._output.write(data)
        child.close()
        self._child = None

    def _fail(self, kind: str, why: str) -> NoReturn:
        assert self._child is not None
        self._end(self._child)
        self._say(kind, why)
        raise SystemExit

    def _hear(self) -> None:
        data = self._pool.recv(2**16)
        if not data:
            raise SystemExit  # the pool has ended
        self._questions += data

    def _say(self, *message: Any) -> None:
        self._pool.sendall(json.dumps(message).encode() + b"\n")


def answer_in(line: bytes, nonce: str) -> Answer | None:
    """What the process of a reward answered, or None if that is no answer to the question with ``nonce``."""
    match parsed(line):
        case [str(echo), "scored", float(reward), ""] if echo == nonce and math.isfinite(reward):
            return "scored", reward, ""
        case [str(echo), "no_verdict" | "error" as outcome, None, str(why)] if echo == nonce:
            return outcome, None, why[:ERROR_CHARACTERS]
    return None


def parsed(line: bytes) -> Any:
    """The JSON value of one line; None if it is none, or more than one."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def main(reward: str, deadline_s: float, memory_mb: int, descriptor: int, parent: int) -> None:
    """Serve until the pool ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    die_with(parent, signal.SIGTERM)
    adopt_orphans()
    os.set_inheritable(descriptor, False)
    pool = socket.socket(fileno=descriptor)
    guard = RewardGuard(reward, deadline_s=deadline_s, memory_mb=memory_mb, pool=pool)
    try:
        guard.serve()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the end
        guard.close()


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
