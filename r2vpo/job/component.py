"""An actor of the job under its name: asked with a deadline, and named in every sentence about its failure.

What the driver and the workers see of each other's failures passes through `Component.ask`: the death of a process, an
error that crossed Ray and a silence all become one sentence, and the remote traceback stays attached for the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ray.exceptions import RayActorError, RayError, RayTaskError

ANSWER_S = 120.0
"""Longest wait for an answer that needs no work (seconds): a machine that is far too small still makes it."""
WATCH_S = 1.0
"""Between two looks at a living process (seconds)."""
ROLL_CALL_S = 3.0
"""After a failure, how long to wait for the news that a process has died (seconds)."""

T = TypeVar("T")


FINAL_CAUSES = (ValueError, TypeError, LookupError, AssertionError, NotImplementedError)
"""What a component raises that it would raise again: wrong input, or a wrong program. Starting it anew is no cure."""


class JobFailed(RuntimeError):  # noqa: N818 - says what happened
    """Something of the run failed; the message names who, and how."""

    is_final = False
    """Whether it would fail in the same way again if its processes were started anew."""


class FailedForGood(JobFailed):
    """The run cannot go on."""

    is_final = True


class ComponentLost(JobFailed):
    """A component answers no more, whatever its process does."""


class ComponentDied(ComponentLost):
    """The process of a component is gone."""


class ComponentSilent(ComponentLost):
    """A component does not answer in time."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One actor of the job."""

    name: str
    """What people read: ``rollout-0``, ``learner-1``, ``replay store``."""
    actor: Any
    log: Path | None = None
    """Where its process writes, if it writes anywhere."""

    async def ask(
        self,
        method: str,
        *arguments: Any,
        within_s: float | None = ANSWER_S,
        passing: tuple[type[Exception], ...] = (),
        **settings: Any,
    ) -> Any:
        """The answer of the actor's ``method``.

        ``ComponentDied`` if its process is gone, ``ComponentSilent`` if it does not answer ``within_s`` seconds (None:
        however long it takes), another ``JobFailed`` if it raises anything but ``passing``.
        """
        call = getattr(self.actor, method).remote(*arguments, **settings)
        return await self.answer(method, call, within_s=within_s, passing=passing)

    async def answer(
        self,
        method: str,
        call: Awaitable[Any],
        *,
        within_s: float | None = ANSWER_S,
        passing: tuple[type[Exception], ...] = (),
    ) -> Any:
        """What a ``call`` of ``method`` that is under way comes to. Errors as in `ask`."""
        try:
            async with asyncio.timeout(within_s):
                return await call
        except passing:
            raise
        except RayError as error:  # before TimeoutError: a remote one is both
            self._fail(error)
        except TimeoutError:
            raise ComponentSilent(f"{self.name} did not finish {method} within {within_s:g} s{self._see()}") from None

    async def watch(self, pulse: str = "__ray_ready__", *, silent_s: float | None = None) -> NoReturn:
        """Ask ``pulse`` again and again until it is not answered: ``ComponentDied``, or ``ComponentSilent`` after
        ``silent_s`` seconds. An actor that works on one call at a time answers only between two calls.
        """
        while True:
            try:
                await self.ask(pulse, within_s=silent_s)
            except ComponentSilent as silence:
                raise ComponentSilent(f"{self.name} has not answered for {silent_s:g} s{self._see()}") from silence
            await asyncio.sleep(WATCH_S)

    def _fail(self, error: RayError) -> NoReturn:
        if isinstance(error, RayActorError) and not error.actor_init_failed:
            raise ComponentDied(f"{self.name} died: its process was killed or crashed{self._see()}") from error
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(cause, JobFailed):
            raise cause from error  # it names the component behind this one
        kind = FailedForGood if isinstance(cause, FINAL_CAUSES) else JobFailed
        raise kind(f"{self.name} failed: {plain_message(error)}{self._see()}") from error

    def _see(self) -> str:
        """Where to read on: the driver keeps the rest of every error in ``error.log``."""
        return f"; see {self.log} and error.log beside it" if self.log else "; see logs/error.log"


async def together(*works: Coroutine[Any, Any, T]) -> list[T]:
    """The results of all; the error of the first to fail, once the others are cancelled."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        await cancelled(*tasks)


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Cancel what is still running, and leave no error unlooked at."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def while_all_live(work: Coroutine[Any, Any, T], lives: Sequence[asyncio.Future[NoReturn]]) -> T:
    """The result of ``work``; or the error of the first of ``lives`` to end, with ``work`` cancelled."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, *lives}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            for life in lives:
                if life.done():
                    life.result()  # raises
        return task.result()
    finally:
        await cancelled(task)


async def until_stop(work: Coroutine[Any, Any, None], stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Finish ``work``, or cancel it as soon as ``stop`` returns."""
    task, stopped = asyncio.ensure_future(work), asyncio.ensure_future(stop())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        await cancelled(task, stopped)


async def roll_call(components: Sequence[Component]) -> list[ComponentDied]:
    """The deaths among ``components``. The dead answer at once, the living do not matter."""
    calls = [asyncio.ensure_future(component.ask("__ray_ready__", within_s=ROLL_CALL_S)) for component in components]
    await asyncio.wait(calls)
    errors = [call.exception() for call in calls]
    return [error for error in errors if isinstance(error, ComponentDied)]


def plain_message(failure: BaseException) -> str:
    """One line for a person: of an error that crossed Ray, the error itself and not the remote traceback."""
    if isinstance(failure, RayActorError) and failure.actor_init_failed:
        # Ray hands the error of a constructor on as the text of its traceback alone.
        return str(failure).strip().splitlines()[-1].partition(": ")[2]
    if isinstance(failure, RayTaskError):
        failure = failure.cause
    lines = str(failure).strip().splitlines()
    return lines[0] if lines else type(failure).__name__
