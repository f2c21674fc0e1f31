"""Commands to the driver of a run that goes on, as files in ``RUN/control``: they need no port, no token and no Ray.

    client ──ID.request.json──▶ driver ──ID.answer.json──▶ client

    request  {"command": "scale", "arguments": {"rollout": 3}}
    answer   {"ok": true, "result": {…}}   or   {"ok": false, "error": "one sentence"}

Every file appears whole. The driver takes a request away before it works on it, so that it is carried out at most once;
who may write into the run's folder may command the run, and nobody else.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from r2vpo.job.rundir import RunDir, write_whole
from r2vpo.job.settings import ConfigError

POLL_S = 0.1
"""Between two looks for a request, or for its answer (seconds); a look is one listing of a small folder."""
REQUEST = ".request.json"
ANSWER = ".answer.json"
ID = re.compile(r"[0-9A-Za-z-]{1,64}")
COMMANDS: Mapping[str, Mapping[str, type]] = {
    "scale": {"rollout": int},
    "drain": {"worker": str},
    "checkpoint": {},
    "stop": {},
}
"""What a run can be told: the arguments of every command."""
OPTIONAL: Mapping[str, Mapping[str, type]] = {"scale": {"pool": str}}
"""Arguments that may be left out."""

Handle = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]


async def serve_mailbox(directory: Path, handle: Handle) -> NoReturn:
    """Answer the requests in ``directory`` until cancelled; several may be under way at once.

    ``handle`` is given a command of `COMMANDS` with its arguments, and returns what the answer's ``result`` is to be. A
    ``ValueError`` from it becomes the answer's error. Anything else that it raises is raised here.
    """
    directory.mkdir(exist_ok=True)
    under_way: set[asyncio.Task[None]] = set()
    try:
        while True:
            for file in sorted(directory.glob(f"*{REQUEST}")):
                request_id = file.name.removesuffix(REQUEST)
                text = _take(file)
                if ID.fullmatch(request_id) and text is not None:
                    answer = directory / f"{request_id}{ANSWER}"
                    under_way.add(asyncio.create_task(_serve(text, answer, handle)))
            done, under_way = {t for t in under_way if t.done()}, {t for t in under_way if not t.done()}
            for task in done:
                task.result()
            await asyncio.sleep(POLL_S)
    finally:
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


def ask_run(run: RunDir, command: str, *, within_s: float, **arguments: Any) -> dict[str, Any]:
    """What the driver of ``run`` answers to ``command``, within ``within_s`` seconds.

    ``ConfigError`` with one sentence: nobody runs the run, the driver refused, it ended, or did not answer in time.
    """
    _check(command, arguments)
    runner = run.runner()
    if runner is None:
        raise ConfigError(f"{run.path} is not running: nothing can carry out {command}; r2vpo status says how it ended")
    request_id = f"{time.time_ns()}-{secrets.token_hex(4)}"
    request, answer = (run.control / f"{request_id}{ending}" for ending in (REQUEST, ANSWER))
    try:
        run.control.mkdir(exist_ok=True)
        write_whole(request, json.dumps({"command": command, "arguments": arguments}))
    except OSError as error:
        raise ConfigError(f"{command}: cannot write into {run.control}: {error.strerror}") from None
    try:
        reply = _await_answer(run, runner, request, answer, within_s)
    except ConfigError as error:
        raise ConfigError(f"{command}: {error}") from None
    finally:
        request.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
    if not reply["ok"]:
        raise ConfigError(reply["error"])
    return reply["result"]


def _await_answer(run: RunDir, runner: str, request: Path, answer: Path, within_s: float) -> dict[str, Any]:
    until_s = time.monotonic() + within_s
    while True:
        # In this order: a driver that has answered and ended since then is not taken for one that did not answer.
        has_ended = run.runner() != runner
        with suppress(FileNotFoundError):
            return json.loads(answer.read_text(encoding="utf-8"))
        if has_ended:
            raise ConfigError(f"process {runner}, which ran {run.path}, ended without an answer; see r2vpo status")
        if time.monotonic() > until_s:
            if request.exists():
                raise ConfigError(
                    f"process {runner} runs {run.path} but has not taken the command within {within_s:g} s, and it is "
                    "withdrawn; the run may still be starting, or be busy: see r2vpo status and try again"
                )
            raise ConfigError(
                f"process {runner} has taken the command but not finished it within {within_s:g} s; it is still at it: "
                "see r2vpo status"
            )
        time.sleep(POLL_S)


async def _serve(text: str, answer: Path, handle: Handle) -> None:
    try:
        command, arguments = _parse(text)
        reply: dict[str, Any] = {"ok": True, "result": await handle(command, arguments)}
    except ValueError as error:
        reply = {"ok": False, "error": str(error)}
    with suppress(OSError):  # the command is carried out; a full disk, which the run shows, must not end it
        write_whole(answer, json.dumps(reply))


def _take(file: Path) -> str | None:
    """The text of a request, which is then gone; None if it was withdrawn meanwhile."""
    try:
        text = file.read_bytes().decode(errors="replace")
        file.unlink()
    except FileNotFoundError:
        return None
    return text


def _parse(text: str) -> tuple[str, Mapping[str, Any]]:
    """Command and arguments of a request. ``ValueError`` if it is none."""
    request = json.loads(text)
    if not isinstance(request, dict) or not isinstance(request.get("arguments"), dict):
        raise ValueError('a request is {"command": …, "arguments": {…}}')
    _check(request.get("command"), request["arguments"])
    return request["command"], request["arguments"]


def _check(command: object, arguments: Mapping[str, Any]) -> None:
    """``ConfigError`` unless this is a command with its arguments."""
    if not isinstance(command, str) or command not in COMMANDS:
        raise ConfigError(f"there is no command {command}; a run can be told {', '.join(COMMANDS)}")
    wanted, optional = COMMANDS[command], OPTIONAL.get(command, {})
    known = {**wanted, **optional}
    is_complete = wanted.keys() <= arguments.keys() <= known.keys()
    if not is_complete or any(type(value) is not known[key] for key, value in arguments.items()):
        takes = ", ".join(f"{key} ({kind.__name__})" for key, kind in wanted.items()) or "nothing"
        takes += "".join(f", perhaps {key} ({kind.__name__})" for key, kind in optional.items())
        raise ConfigError(f"{command} takes {takes}, and was given {json.dumps(dict(arguments))}")
