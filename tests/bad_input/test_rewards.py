"""Rewards that cannot be called; what a callable one may return is in the second table."""

from __future__ import annotations

import itertools

import pytest

from r2vpo.records import Outcome
from rollout.rewards import RewardPool
from tests.bad_input.place import Place, Row, ids, overrides

_number = itertools.count()


def module(code: str | bytes, name: str = "score"):
    """A reward in a module of its own, which no other row has imported."""

    def arrange(place: Place):
        stem = f"bad_reward_{next(_number)}"
        (place.root / f"{stem}.py").write_bytes(code if isinstance(code, bytes) else code.encode())
        return (f"task.reward={stem}:{name}",)

    return arrange


ROWS = [
    Row("no colon", overrides("task.reward=score"), "task.reward=score must have the form module:function"),
    Row("two colons", overrides("task.reward=a:b:c"), "must have the form module:function"),
    Row("nothing", overrides("task.reward="), "must have the form module:function"),
    Row("a path", overrides("task.reward=../mine:score"), "module ../mine cannot be imported"),
    Row("no module", overrides("task.reward=nowhere_at_all:score"), "there is no module nowhere_at_all"),
    Row("no function", module("x = 1\n"), "has no function score"),
    Row("not callable", module("score = 3\n"), "score is of type int, not a function"),
    Row("one parameter", module("def score(response): ...\n"), "takes (response), but is called with a response and a"),
    Row("three parameters", module("def score(a, b, c): ...\n"), "give it two parameters"),
    Row("only keywords", module("def score(*, response, truth): ...\n"), "give it two parameters"),
    Row("coroutine", module("async def score(a, b): ...\n"), "is a coroutine (async def); make it a plain function"),
    Row("raises at import", module("raise RuntimeError('no\\nGPU')\n"), "cannot be imported (RuntimeError: no GPU)"),
    Row("exits at import", module("import sys\nsys.exit(0)\n"), "cannot be imported (SystemExit: 0)"),
    Row("imports nothing", module("import none_such\n"), "No module named 'none_such'"),
    Row("bad syntax", module("def score(:\n"), "cannot be imported (SyntaxError: "),
    Row("binary", module(b"\0\1"), "cannot be imported ("),
]


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_a_reward_that_cannot_be_called_is_named_before_anything_starts(row, refused):
    refused(row)


RETURNS = {
    "None": ("None", Outcome.NO_VERDICT, ""),
    "NaN": ("float('nan')", Outcome.NO_VERDICT, "the reward returned nan, which is not finite"),
    "infinite": ("float('-inf')", Outcome.NO_VERDICT, "the reward returned -inf, which is not finite"),
    "huge": ("10 ** 400", Outcome.NO_VERDICT, "the reward returned inf, which is not finite"),
    "text": ("'1'", Outcome.NO_VERDICT, "the reward returned a str, not a number"),
    "list": ("[1.0]", Outcome.NO_VERDICT, "the reward returned a list, not a number"),
    "complex": ("1j", Outcome.NO_VERDICT, "the reward returned a complex, not a number"),
    "error": ("1 / 0", Outcome.ERROR, "ZeroDivisionError: division by zero"),
    "number": ("0.5", Outcome.SCORED, ""),
}
RESPONSES = {"empty": "", "replacement": "\ufffd", "half a character": "\ud83d", "NUL": "\0", "long": "x" * 10**6}


async def test_no_return_value_and_no_response_takes_a_number_or_the_pool_along(place):
    """One process for all: none of them ends it, and none becomes a reward of 0."""
    cases = "".join(f"    if response == {name!r}: return {value}\n" for name, (value, _, _) in RETURNS.items())
    (place.root / "odd_reward.py").write_text(f"def score(response, truth):\n{cases}    return len(response)\n")
    pool = RewardPool("odd_reward:score", processes=1, deadline_s=10.0, memory_mb=256)
    await pool.start()
    try:
        verdicts = await pool.score([(name, None) for name in RETURNS])
        lengths = await pool.score([(text, "2") for text in RESPONSES.values()])
    finally:
        pool.close()
    said = {name: (v.outcome, v.error) for name, v in zip(RETURNS, verdicts, strict=True)}
    assert said == {name: (outcome, error) for name, (_, outcome, error) in RETURNS.items()}
    assert [v.reward for v in verdicts] == [None] * 8 + [0.5]
    assert [v.reward for v in lengths] == [0, 1, 1, 1, 10**6]
