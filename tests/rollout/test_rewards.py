"""Verdicts from real reward processes (no engine): what each misdeed becomes, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from r2vpo.records import Outcome
from rollout.reward_process import judge
from rollout.rewards import RewardPool, RewardPoolFailed, Verdict

SCORE = "tests.rollout.sample_rewards:score"
RIGHT, WRONG = Verdict(outcome=Outcome.SCORED, reward=1.0), Verdict(outcome=Outcome.SCORED, reward=0.0)


@pytest.fixture
async def make_pool():
    pools = []

    async def make(reward: str = SCORE, *, processes: int = 1, deadline_s: float = 10.0) -> RewardPool:
        pools.append(RewardPool(reward, processes=processes, deadline_s=deadline_s, memory_mb=2048))
        await pools[-1].start()
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


async def pids(pool: RewardPool, count: int = 1) -> set[int]:
    """Numbers of the processes that answer ``count`` simultaneous questions."""
    verdicts = await asyncio.gather(*(pool.score([("pid", None)]) for _ in range(count)))
    return {int(verdict.reward) for [verdict] in verdicts}


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def gone(pid: int) -> None:
    async with asyncio.timeout(10):
        while is_running(pid):
            await asyncio.sleep(0.01)


async def test_verdicts_come_in_the_order_of_the_items(make_pool):
    pool = await make_pool()
    assert await pool.score([("a", "a"), ("b", "a"), ("a", "a")]) == [RIGHT, WRONG, RIGHT]
    assert await pool.score([]) == []


async def test_truths_may_be_any_json_value_and_responses_any_text(make_pool):
    pool = await make_pool("tests.rollout.sample_rewards:is_same")
    truths = [None, True, 1.5, "ä\n\u2028\ud800", ["x", {"y": [1]}], {"a": None}]
    items = [(json.dumps(truth), truth) for truth in truths]
    assert await pool.score(items) == [RIGHT] * len(items)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("true", (Outcome.SCORED, 1.0, "")),
        ("half", (Outcome.SCORED, 0.5, "")),
        ("none", (Outcome.NO_VERDICT, None, "")),
        ("nan", (Outcome.NO_VERDICT, None, "the reward returned nan, which is not finite")),
        ("inf", (Outcome.NO_VERDICT, None, "the reward returned inf, which is not finite")),
        ("huge", (Outcome.NO_VERDICT, None, "the reward returned inf, which is not finite")),
        ("text", (Outcome.NO_VERDICT, None, "the reward returned a str, not a number")),
        ("raise", (Outcome.ERROR, None, "ZeroDivisionError: division by zero")),
    ],
)
def test_what_a_reward_returns_becomes_an_outcome(response, expected):
    from tests.rollout.sample_rewards import score

    outcome, reward, error = judge(score, response, None)
    assert (Outcome(outcome), reward, error) == expected


async def test_items_around_those_without_a_reward_are_judged(make_pool):
    pool = await make_pool()
    verdicts = await pool.score([("a", "a"), ("raise", ""), ("none", ""), ("nan", ""), ("a", "a")])
    assert [v.outcome.value for v in verdicts] == ["scored", "error", "no_verdict", "no_verdict", "scored"]
    assert "ZeroDivisionError" in verdicts[1].error
    assert [v.reward for v in verdicts] == [1.0, None, None, None, 1.0]


@pytest.mark.parametrize(
    ("misdeed", "reason"),
    [("exit", "exit code 3"), ("sys.exit", "exit code 4"), ("segfault", "signal SIGSEGV")],
)
async def test_a_reward_that_ends_its_process_is_the_error_of_its_item_alone(make_pool, misdeed, reason):
    pool = await make_pool()
    verdicts = await pool.score([("a", "a"), (misdeed, ""), ("b", "a"), (misdeed, ""), ("a", "a")])
    error = Verdict(outcome=Outcome.ERROR, error=f"the reward's process ended with {reason}")
    assert verdicts == [RIGHT, error, WRONG, error, RIGHT]


async def test_an_item_that_hangs_is_the_only_timeout_and_its_process_is_killed(make_pool):
    pool = await make_pool(deadline_s=1.0)
    before = await pids(pool)
    verdicts = await pool.score([("a", "a"), ("hang", ""), ("b", "a"), ("a", "a")])
    assert verdicts == [RIGHT, Verdict(outcome=Outcome.TIMEOUT, error="no verdict within 1 s"), WRONG, RIGHT]
    after = await pids(pool)
    assert before != after
    assert not any(is_running(pid) for pid in before)


async def test_the_deadline_is_for_each_item_and_not_for_the_batch(make_pool):
    pool = await make_pool("tests.rollout.sample_rewards:slow", deadline_s=1.0)
    assert await pool.score([("a", "a")] * 4) == [RIGHT] * 4


async def test_an_event_loop_that_stood_still_past_the_deadline_finds_the_verdict(make_pool):
    pool = await make_pool(deadline_s=0.2)
    scoring = asyncio.create_task(pool.score([("a", "a")]))
    await asyncio.sleep(0)  # the question is on its way
    time.sleep(1.0)
    assert await scoring == [RIGHT]


async def test_prints_of_a_reward_and_of_its_children_disturb_nothing(make_pool):
    pool = await make_pool()
    assert await pool.score([("print", ""), ("a", "a"), ("print", ""), ("b", "a")]) == [RIGHT, RIGHT, RIGHT, WRONG]


async def test_processes_work_side_by_side(make_pool):
    pool = await make_pool(processes=2)
    assert len(await pids(pool, count=6)) == 2


async def test_a_process_that_died_between_two_batches_is_no_error_of_the_next_item(make_pool):
    pool = await make_pool()
    [pid] = await pids(pool)
    os.kill(pid, signal.SIGKILL)
    await gone(pid)
    assert await pool.score([("a", "a")]) == [RIGHT]


async def test_a_batch_that_is_cancelled_leaves_nothing_for_the_next(make_pool):
    pool = await make_pool()
    [pid] = await pids(pool)
    scoring = asyncio.create_task(pool.score([("a", "a"), ("hang", "")]))
    await asyncio.sleep(0.05)
    scoring.cancel()
    with pytest.raises(asyncio.CancelledError):
        await scoring
    assert not is_running(pid)
    assert await pool.score([("b", "a")]) == [WRONG]


async def test_a_killed_process_takes_its_children_along(make_pool):
    pool = await make_pool(deadline_s=1.0)
    [child, _] = await pool.score([("children", ""), ("hang", "")])
    await gone(int(child.reward))


async def test_closing_kills_everything_may_be_repeated_and_ends_what_is_in_work(make_pool):
    pool = await make_pool(processes=2)
    running = await pids(pool, count=4)
    [child] = await pool.score([("children", "")])
    scoring = asyncio.create_task(pool.score([("hang", "")]))
    await asyncio.sleep(0.05)
    pool.close()
    pool.close()
    assert not any(is_running(pid) for pid in running)
    await gone(int(child.reward))
    with pytest.raises(RewardPoolFailed, match="closed"):
        await scoring
    with pytest.raises(RewardPoolFailed, match="closed"):
        await pool.score([("a", "a")])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # asyncio misses its closed loop
def test_closing_works_after_the_loop_has_ended():
    pool = RewardPool(SCORE, processes=1, deadline_s=10.0, memory_mb=2048)

    async def use() -> int:
        await pool.start()
        return next(iter(await pids(pool)))

    pid = asyncio.run(use())
    assert is_running(pid)
    pool.close()
    assert not is_running(pid)


async def test_closing_a_pool_that_was_never_started_does_nothing():
    RewardPool(SCORE, processes=1, deadline_s=1.0, memory_mb=2048).close()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("nowhere:score", "there is no module nowhere"),
        ("tests.rollout.sample_rewards:missing", "has no function missing"),
        ("tests.rollout.broken_reward:score", "no licence file"),
    ],
)
async def test_a_reward_that_does_not_exist_is_said_at_the_start(make_pool, reward, message):
    with pytest.raises(ValueError, match=message):
        await make_pool(reward, processes=2)


async def test_a_module_that_ends_its_process_while_it_is_imported_is_said(make_pool, tmp_path, monkeypatch):
    (tmp_path / "quitter.py").write_text("import os\nos._exit(5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardPoolFailed, match="quitter:score: its process ended with exit code 5"):
        await make_pool("quitter:score")


async def test_a_module_in_the_working_directory_is_found(make_pool, tmp_path, monkeypatch):
    (tmp_path / "my_local_reward.py").write_text("def score(response, truth):\n    return len(response)\n")
    monkeypatch.chdir(tmp_path)
    pool = await make_pool("my_local_reward:score")
    assert await pool.score([("four", None)]) == [Verdict(outcome=Outcome.SCORED, reward=4.0)]


def test_the_processes_die_with_their_parent_even_in_an_item_that_hangs():
    parent = subprocess.Popen(
        [sys.executable, "-m", "tests.rollout.test_rewards"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    asyncio.run(gone(pid))


def test_a_reward_process_imports_nothing_heavy():
    code = (
        "import sys, rollout.reward_process, rollout.tasks.arithmetic\n"
        "print([m for m in ('numpy', 'torch', 'vllm', 'transformers', 'ray', 'asyncio') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


async def _hang_forever() -> None:
    pool = RewardPool(SCORE, processes=1, deadline_s=1000.0, memory_mb=2048)
    await pool.start()
    [pid] = await pids(pool)
    hanging = asyncio.create_task(pool.score([("hang", "")]))
    await asyncio.sleep(0.5)  # until it is at it: an idle process would end with its socket
    print(pid, flush=True)
    await hanging


if __name__ == "__main__":
    asyncio.run(_hang_forever())
