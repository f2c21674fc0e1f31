"""What a hostile reward can do to the others' verdicts, to the machine and to the pool: nothing. Real processes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from r2vpo.records import Outcome
from rollout.bounded_output import BoundedOutput
from rollout.process_family import descendants
from rollout.reward_guard import answer_in
from rollout.rewards import RewardPool, Verdict

REWARD = "tests.rollout.hostile_rewards:score"
GOOD = Verdict(outcome=Outcome.SCORED, reward=1.0)
TALKED = (Outcome.ERROR, "the reward wrote to the socket of its process")


def error(text: str) -> tuple[Outcome, str]:
    """What an item becomes whose process ended, or was ended."""
    return Outcome.ERROR, f"the reward's process {text}"


@pytest.fixture
async def make_pool():
    pools = []

    async def make(*, deadline_s: float = 10.0, memory_mb: int = 256) -> RewardPool:
        pools.append(RewardPool(REWARD, processes=1, deadline_s=deadline_s, memory_mb=memory_mb))
        await pools[-1].start()
        return pools[-1]

    before = descendants(os.getpid())
    yield make
    for pool in pools:
        pool.close()
    assert descendants(os.getpid()) <= before, "a process was left behind"


def is_running(pid: float | None) -> bool:
    """Whether a process is there and no zombie."""
    assert pid is not None
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("deed", "expected"),
    [
        ("allocate", (Outcome.ERROR, "MemoryError: ")),
        ("share memory", error("and what it started hold more than task.reward_memory_mb=256 MiB of memory")),
        ("divide memory", error("and what it started hold more than task.reward_memory_mb=256 MiB of memory")),
        ("fork many", error("started more than 64 processes")),
        ("kill itself", error("ended with signal SIGKILL")),
        ("kill its group", error("ended with signal SIGKILL")),
        ("kill the guard", (Outcome.ERROR, "the reward ended the guard of its process")),
        ("interrupt", error("ended with signal SIGINT")),
        ("recurse", (Outcome.ERROR, "RecursionError: maximum recursion depth exceeded")),
        ("close everything", error("ended with exit code 1")),
        ("write garbage", TALKED),
        ("write no line", TALKED),
        ("forge an answer", TALKED),
        ("no float", (Outcome.ERROR, "OSError: no value")),
    ],
)
async def test_a_misdeed_is_the_error_of_its_item_alone(make_pool, deed, expected):
    pool = await make_pool()
    before, bad, after = await pool.score([("good", None), (deed, None), ("good", None)])
    assert (bad.outcome, bad.error, bad.reward) == (*expected, None)
    assert (before, after) == (GOOD, GOOD)


@pytest.mark.parametrize(("deed"), ["stop", "close everything and hang"])
async def test_one_that_stands_still_is_ended_and_the_next_is_judged(make_pool, deed):
    pool = await make_pool(deadline_s=0.5)
    bad, after = await pool.score([(deed, None), ("good", None)])
    assert bad.outcome in (Outcome.TIMEOUT, Outcome.ERROR)
    assert bad.reward is None
    assert after == GOOD


async def test_a_fork_that_comes_back_answers_no_question(make_pool):
    pool = await make_pool()
    items = [("fork and return", None), ("fork and raise", None)] * 3
    assert await pool.score(items) == [GOOD] * 6


async def test_an_orphan_in_a_session_of_its_own_ends_with_the_call(make_pool):
    pool = await make_pool()
    [first] = await pool.score([("pid", None)])
    [orphan] = await pool.score([("leave orphan", None)])
    assert orphan.outcome is Outcome.SCORED
    [second] = await pool.score([("pid", None)])
    assert first.reward == second.reward  # the process itself goes on
    assert not is_running(orphan.reward)


async def test_an_orphan_of_a_process_that_ended_is_ended_too(make_pool, tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTILE_FILE", str(tmp_path / "orphan"))
    pool = await make_pool()
    bad, after = await pool.score([("leave orphan and die", None), ("good", None)])
    assert (bad.outcome, bad.error) == error("ended with exit code 7")
    assert after == GOOD
    assert not is_running(int((tmp_path / "orphan").read_text()))


async def test_a_helper_that_starts_with_the_import_lasts_as_long_as_the_process(make_pool, monkeypatch):
    monkeypatch.setenv("HOSTILE_HELPER", "1")
    pool = await make_pool()
    helpers = await pool.score([("helper", None), ("leave orphan", None), ("helper", None)])
    assert helpers[0] == helpers[2]
    assert is_running(helpers[0].reward)
    pool.close()
    assert not is_running(helpers[0].reward)


async def test_a_gigabyte_of_output_neither_blocks_nor_fills_the_log(make_pool, capfd):
    pool = await make_pool()
    verdicts = await pool.score([("print a gigabyte", None), ("good", None)])
    assert verdicts == [GOOD, GOOD]
    await pool.score([("say", None)])
    pool.close()
    said = capfd.readouterr().err
    assert 8 * 2**10 <= len(said) <= 2 * 2**10 + 2 * 8 * 2**10  # what is still in the pipe goes with the next item
    assert "said by the reward" in said


async def test_where_memory_runs_out_the_kernel_takes_rewards_first(make_pool):
    pool = await make_pool()
    assert await pool.score([("oom", None)]) == [Verdict(outcome=Outcome.SCORED, reward=1000.0)]


async def test_the_next_call_comes_at_once_after_a_misdeed(make_pool):
    pool = await make_pool()
    [bad] = await pool.score([("kill itself", None)])
    assert bad.outcome is Outcome.ERROR
    started_s = time.monotonic()
    assert await pool.score([("good", None)]) == [GOOD]
    assert time.monotonic() - started_s < 2.0


def test_output_is_cut_for_the_item_and_for_all(tmp_path):
    with open(tmp_path / "log", "wb") as log:
        output = BoundedOutput(log.fileno(), item_bytes=4, total_bytes=6)
        output.write(b"abc")
        output.write(b"def")
        output.write(b"ghi")
        output.next_item()
        output.write(b"jkl")
        output.next_item()
        output.write(b"mno")
    assert (tmp_path / "log").read_bytes() == (
        b"abcd\n[the rest of what the reward prints for this response is left out]\n"
        b"jk\n[nothing that rewards print is written down from here on]\n"
    )


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (b'["n", "scored", 0.5, ""]\n', ("scored", 0.5, "")),
        (b'["n", "no_verdict", null, "why"]\n', ("no_verdict", None, "why")),
        (b'["n", "error", null, "why"]\n', ("error", None, "why")),
        (b'["m", "scored", 0.5, ""]\n', None),
        (b'["n", "scored", NaN, ""]\n', None),
        (b'["n", "scored", "1", ""]\n', None),
        (b'["n", "scored", null, ""]\n', None),
        (b'["n", "error", 1.0, "why"]\n', None),
        (b'["n", "timeout", null, "why"]\n', None),
        (b'["n", "scored", 0.5, ""]\n["n", "scored", 0.5, ""]\n', None),
        (b"\xff\xfe\n", None),
        (b"[" * 16_000 + b"\n", None),
        (b"1" * 16_000 + b"\n", None),
    ],
)
def test_only_an_answer_to_the_question_is_one(line, answer):
    assert answer_in(line, "n") == answer
