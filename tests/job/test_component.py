"""Failures of actors as sentences. The actors are fakes that raise what Ray raises; nothing here starts Ray."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayActorError

from r2vpo.job.component import (
    ComponentDied,
    ComponentSilent,
    JobFailed,
    cancelled,
    plain_message,
    roll_call,
    together,
    until_stop,
    while_all_live,
)
from tests.job.fakes import component, remote


async def test_an_answer_passes_through():
    assert await component(7).ask("anything", 1, key=2) == 7


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            ActorDiedError(),
            r"^learner-0 died: its process was killed or crashed; see logs/learner-0\.log and error\.log",
        ),
        (remote(ValueError("no\nmore")), r"^learner-0 failed: no; see logs/learner-0\.log and error\.log beside it$"),
        (remote(TimeoutError()), r"^learner-0 failed: TimeoutError; see"),
        (
            RayActorError(error_msg="The actor died …\n  File …\nValueError: store x: in use", actor_init_failed=True),
            r"^learner-0 failed: store x: in use; see",
        ),
    ],
)
async def test_every_error_of_an_actor_is_one_sentence_with_its_name(error, sentence):
    with pytest.raises(JobFailed, match=sentence) as caught:
        await component(error).ask("step")
    assert caught.value.__cause__ is error
    assert isinstance(caught.value, ComponentDied) == isinstance(error, ActorDiedError)


async def test_an_actor_that_does_not_answer_is_named_with_what_it_was_asked():
    with pytest.raises(JobFailed, match=r"^board did not finish post within 0\.01 s; see logs/error\.log$"):
        await component(asyncio.Event(), "board", None).ask("post", within_s=0.01)


async def test_an_error_about_a_third_component_keeps_its_name():
    told = remote(ComponentDied("replay store died"))
    with pytest.raises(ComponentDied, match=r"^replay store died$"):
        await component(told, "rollout-0").ask("run")


@pytest.mark.parametrize(
    ("cause", "is_final"),
    [(ValueError("x"), True), (TypeError("x"), True), (RuntimeError("x"), False), (OSError("x"), False)],
)
async def test_what_would_be_raised_again_is_told_from_what_another_start_may_cure(cause, is_final):
    with pytest.raises(JobFailed) as caught:
        await component(remote(cause)).ask("step")
    assert caught.value.is_final is is_final


async def test_a_process_that_hangs_is_told_from_one_that_is_gone():
    with pytest.raises(ComponentSilent, match=r"^learner-0 has not answered for 0\.01 s; see"):
        await component(asyncio.Event()).watch(silent_s=0.01)


async def test_a_watch_lasts_until_the_process_is_gone():
    busy = component(asyncio.Event())
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(busy.watch(), 0.02)
    with pytest.raises(ComponentDied, match="learner-0 died"):
        await component(ActorDiedError()).watch()


async def test_the_roll_call_tells_the_dead_from_the_busy_and_the_failed(monkeypatch):
    monkeypatch.setattr("r2vpo.job.component.ROLL_CALL_S", 0.01)
    crew = {
        "well": True,
        "busy": asyncio.Event(),
        "dead": ActorDiedError(),
        "unbuilt": RayActorError(error_msg="x", actor_init_failed=True),
    }
    deaths = await roll_call([component(answer, name, None) for name, answer in crew.items()])
    assert [str(death).partition(":")[0] for death in deaths] == ["dead died"]


async def test_of_works_done_together_the_first_error_cancels_the_others():
    ends = []

    async def work(error: Exception | None) -> int:
        try:
            await asyncio.sleep(0 if error else 600)
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise
        raise error or AssertionError

    with pytest.raises(OSError, match="disk"):
        await together(work(None), work(OSError("disk")), work(None))
    assert ends == ["cancelled", "cancelled"]


async def test_work_goes_on_while_all_live_and_ends_with_the_first_that_does_not():
    async def work(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "done"

    well, dead = component(asyncio.Event()), component(ActorDiedError())
    lives = [asyncio.create_task(well.watch())]
    assert await while_all_live(work(0.01), lives) == "done"
    lives.append(asyncio.create_task(dead.watch()))
    with pytest.raises(ComponentDied):
        await while_all_live(work(600), lives)
    assert not lives[0].done()
    await cancelled(*lives)


async def test_whoever_waits_for_work_and_is_cancelled_cancels_it():
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(600)
        finally:
            ended.set()

    outer = asyncio.create_task(while_all_live(until_stop(work(), asyncio.Event().wait), []))
    await asyncio.sleep(0.01)
    await cancelled(outer)
    assert ended.is_set()


async def test_a_stop_cancels_work_and_is_no_error_but_an_error_of_the_work_is():
    async def fail() -> None:
        raise OSError("disk")

    stop = asyncio.Event()
    with pytest.raises(OSError, match="disk"):
        await until_stop(fail(), stop.wait)
    stop.set()
    await until_stop(asyncio.sleep(600), stop.wait)


async def test_results_of_works_done_together_keep_their_order():
    async def number(n: int) -> int:
        await asyncio.sleep(0.01 * (2 - n))
        return n

    assert await together(number(0), number(1), number(2)) == [0, 1, 2]


async def test_cancelling_looks_at_errors_that_nobody_has_seen():
    async def fail() -> None:
        raise OSError("unseen")

    strays = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: strays.append(context))
    task = asyncio.create_task(fail())
    await asyncio.sleep(0)
    await cancelled(task)
    del task
    assert strays == []


def test_an_error_without_words_is_called_by_its_type():
    assert plain_message(TimeoutError()) == "TimeoutError"
    assert plain_message(OSError("first\nsecond")) == "first"
