"""Actors that are no processes: they answer from this one, raise what Ray raises, and die when they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.exceptions import ActorDiedError, RayTaskError

from r2vpo.job.component import Component


def remote(cause: Exception) -> RayTaskError:
    """``cause`` as it arrives from another process."""
    error = RayTaskError("step", "Traceback (most recent call last): …", cause, proctitle="p", pid=1, ip="127.0.0.1")
    return error.as_instanceof_cause()


class Method:
    """A method of an actor that answers with what it was given: an error is raised, an event waited for."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    async def remote(self, *arguments: Any, **settings: Any) -> Any:
        if isinstance(self.answer, BaseException):
            raise self.answer
        if isinstance(self.answer, asyncio.Event):
            await self.answer.wait()
        return self.answer


class Actor:
    """Every method answers with the same."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __getattr__(self, name: str) -> Method:
        return Method(self.answer)


def component(answer: Any, name: str = "learner-0", log: Path | None = Path("logs/learner-0.log")) -> Component:
    return Component(name=name, actor=Actor(answer), log=log)


class Served:
    """An actor around an object with asynchronous methods, until ``die``."""

    def __init__(self, served: object) -> None:
        self.served = served
        self._dead = asyncio.Event()
        self.calls: list[str] = []

    def die(self) -> None:
        """From now on, and where a call is under way, there is no answer."""
        self._dead.set()

    def __getattr__(self, name: str) -> ServedMethod:
        return ServedMethod(self, name)

    async def call(self, name: str, work: Callable[[], Any]) -> Any:
        self.calls.append(name)
        tasks = {asyncio.ensure_future(self._dead.wait())}
        if not self._dead.is_set():
            tasks.add(answer := asyncio.ensure_future(work()))
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel() if not task.done() else None
        if self._dead.is_set():
            raise ActorDiedError()
        return answer.result()


class ServedMethod:
    """One method of a ``Served``."""

    def __init__(self, actor: Served, name: str) -> None:
        self._actor, self._name = actor, name

    def options(self, *, num_returns: int) -> SplitMethod:
        assert num_returns == 2
        return SplitMethod(self._actor, self._name)

    async def remote(self, *arguments: Any, **settings: Any) -> Any:
        async def ready() -> None:
            pass

        method = ready if self._name == "__ray_ready__" else getattr(self._actor.served, self._name)
        return await self._actor.call(self._name, lambda: method(*arguments, **settings))


class SplitMethod:
    """The same with its two answers apart."""

    def __init__(self, actor: Served, name: str) -> None:
        self._actor, self._name = actor, name

    def remote(self, *arguments: Any) -> list[asyncio.Future[Any]]:
        method = getattr(self._actor.served, self._name)
        both = asyncio.ensure_future(self._actor.call(self._name, lambda: method(*arguments)))

        async def part(index: int) -> Any:
            return (await both)[index]

        parts = [asyncio.ensure_future(part(index)) for index in range(2)]
        for future in parts:
            future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return parts
