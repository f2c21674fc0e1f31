import asyncio
import json
from collections.abc import Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from r2vpo.job import mailbox
from r2vpo.job.config import ConfigError
from r2vpo.job.mailbox import ask_run, serve_mailbox
from r2vpo.job.rundir import RunDir


@pytest.fixture
def run(tmp_path):
    """A run that this process runs."""
    with RunDir.create(tmp_path, "toy") as run:
        yield run


class Driver:
    """Answers with what it was told; refuses to drain; does not finish a checkpoint before it is let."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Mapping[str, Any]]] = []
        self.saved = asyncio.Event()

    async def handle(self, command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        self.told.append((command, arguments))
        if command == "drain":
            raise ValueError(f"there is no worker {arguments['worker']}; there are rollout-0")
        if command == "checkpoint":
            await self.saved.wait()
        return {"command": command, **arguments}


@asynccontextmanager
async def serving(run, driver):
    task = asyncio.create_task(serve_mailbox(run.control, driver.handle))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def ask(run, command, *, within_s=20.0, **arguments):
    return await asyncio.to_thread(ask_run, run, command, within_s=within_s, **arguments)


async def put(run, name, text):
    """Leave a request as it is and return the parsed answer."""
    (run.control / f"{name}.request.json").write_text(text)
    answer = run.control / f"{name}.answer.json"
    while not answer.exists():
        await asyncio.sleep(0.01)
    return json.loads(answer.read_text())


async def test_a_command_reaches_the_driver_and_its_answer_comes_back(run):
    driver = Driver()
    async with serving(run, driver):
        assert await ask(run, "scale", rollout=3) == {"command": "scale", "rollout": 3}
        assert await ask(run, "scale", rollout=2, pool="rented") == {"command": "scale", "rollout": 2, "pool": "rented"}
    assert driver.told == [("scale", {"rollout": 3}), ("scale", {"rollout": 2, "pool": "rented"})]
    assert list(run.control.iterdir()) == []


async def test_a_slow_command_holds_up_no_other(run):
    driver = Driver()
    async with serving(run, driver):
        slow = asyncio.create_task(ask(run, "checkpoint"))
        while not driver.told:
            await asyncio.sleep(0.01)
        assert await ask(run, "stop") == {"command": "stop"}
        assert not slow.done()
        driver.saved.set()
        assert await slow == {"command": "checkpoint"}


async def test_what_the_driver_refuses_is_the_error_of_who_asked(run):
    driver = Driver()
    async with serving(run, driver):
        with pytest.raises(ConfigError, match=r"^there is no worker rollout-7; there are rollout-0$"):
            await ask(run, "drain", worker="rollout-7")
        assert await ask(run, "stop") == {"command": "stop"}  # and the next one is served


async def test_an_error_that_is_nobody_s_fault_but_the_program_s_ends_the_serving(run):
    async def handle(command, arguments):
        raise RuntimeError("a bug")

    task = asyncio.create_task(serve_mailbox(run.control, handle))
    (run.control / "1.request.json").write_text('{"command": "stop", "arguments": {}}')
    with pytest.raises(RuntimeError, match="a bug"):
        await task


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("explode", {}, r"there is no command explode; a run can be told scale, drain, checkpoint, stop"),
        ("scale", {}, r"scale takes rollout \(int\), perhaps pool \(str\), and was given \{\}"),
        ("scale", {"rollout": "3"}, r'perhaps pool \(str\), and was given \{"rollout": "3"\}'),
        ("scale", {"rollout": 3, "pool": 1}, r"scale takes rollout \(int\), perhaps pool \(str\)"),
        ("scale", {"pool": "rented"}, r"scale takes rollout \(int\)"),
        ("scale", {"rollout": 3, "to": 1}, r"scale takes rollout \(int\)"),
        ("scale", {"rollout": True}, r"scale takes rollout \(int\)"),
        ("stop", {"now": 1}, r"stop takes nothing, and was given"),
    ],
)
async def test_a_wrong_command_is_refused_on_both_sides(run, command, arguments, message):
    with pytest.raises(ConfigError, match=message):
        ask_run(run, command, within_s=1, **arguments)
    driver = Driver()
    async with serving(run, driver):
        answer = await put(run, "1", json.dumps({"command": command, "arguments": arguments}))
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(answer["error"])
    assert driver.told == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"command": "stop"}', '{"command": [], "arguments": {}}', "\x00"]
)
async def test_a_malformed_request_is_answered_and_harms_nobody(run, text):
    driver = Driver()
    async with serving(run, driver):
        assert (await put(run, "1", text))["ok"] is False
        assert await ask(run, "stop") == {"command": "stop"}


async def test_only_plain_names_are_answered_and_nothing_is_written_elsewhere(run):
    driver = Driver()
    stop = '{"command": "stop", "arguments": {}}'
    for name in ("..", ".hidden", "a b", "ü", "x" * 65):
        (run.control / f"{name}.request.json").write_text(stop)
    async with serving(run, driver):
        assert (await put(run, "a-1", stop))["ok"] is True
        await asyncio.sleep(3 * mailbox.POLL_S)
    assert [entry.name for entry in run.control.iterdir()] == ["a-1.answer.json"]
    assert driver.told == [("stop", {})]


def test_nobody_to_ask_is_said_at_once(tmp_path):
    RunDir.create(tmp_path, "toy").close()
    with pytest.raises(ConfigError, match=r"toy is not running: nothing can carry out stop; r2vpo status"):
        ask_run(RunDir(tmp_path / "toy"), "stop", within_s=60)
    with pytest.raises(ConfigError, match="is not running"):
        ask_run(RunDir(tmp_path / "none"), "stop", within_s=60)
    assert not (tmp_path / "none").exists()


def test_a_command_that_nobody_takes_in_time_is_withdrawn(run):
    with pytest.raises(ConfigError, match=r"stop: .* has not taken the command within 0\.3 s, and it is withdrawn"):
        ask_run(run, "stop", within_s=0.3)
    assert list(run.control.iterdir()) == []


async def test_a_command_that_is_not_finished_in_time_goes_on(run):
    driver = Driver()
    async with serving(run, driver):
        with pytest.raises(ConfigError, match=r"checkpoint: .* taken the command but not finished it within 0\.5 s"):
            await ask(run, "checkpoint", within_s=0.5)
    assert driver.told == [("checkpoint", {})]


async def test_a_driver_that_ends_without_an_answer_is_not_waited_for(run):
    asking = asyncio.create_task(ask(run, "stop", within_s=600))
    while not list(run.control.iterdir()):
        await asyncio.sleep(0.01)
    run.close()
    with pytest.raises(ConfigError, match="ended without an answer; see r2vpo status"):
        await asking


async def test_an_answer_that_cannot_be_written_does_not_end_the_run(run, monkeypatch):
    driver = Driver()
    write, full = mailbox.write_whole, OSError(28, "No space left on device")

    def on_full_disk(path, text):
        if path.name.endswith("answer.json"):
            raise full
        write(path, text)

    monkeypatch.setattr(mailbox, "write_whole", on_full_disk)
    async with serving(run, driver):
        with pytest.raises(ConfigError, match="not finished it"):
            await ask(run, "scale", rollout=2, within_s=0.5)
    assert driver.told == [("scale", {"rollout": 2})]
