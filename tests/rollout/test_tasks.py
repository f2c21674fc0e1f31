"""The arithmetic task, the reward's name, and the way from a configuration to a task."""

from __future__ import annotations

import subprocess
import sys
from itertools import product

import pytest

from rollout.config import TaskConfig
from rollout.tasks.arithmetic import ArithmeticTask, is_held_out, reversed_digits, verify
from rollout.tasks.base import resolve_reward
from rollout.tasks.factory import make_task


def arithmetic(seed: int = 0, eval_prompts: int = 50, **options) -> ArithmeticTask:
    return ArithmeticTask(options, num_eval_prompts=eval_prompts, seed=seed)


def numbers(text: str) -> tuple[int, int]:
    """``"21+59="`` to ``(12, 95)``."""
    first, second = text.removesuffix("=").split("+")
    return int(first[::-1]), int(second[::-1])


def test_digits_are_written_from_the_least_significant_one_on():
    assert reversed_digits(12, 3) == "210"
    assert reversed_digits(0, 2) == "00"
    assert reversed_digits(1998, 4) == "8991"


@pytest.mark.parametrize("digits", [1, 3, 9])
def test_a_prompt_is_a_sum_and_its_truth_the_answer(digits):
    task = arithmetic(digits=digits, num_prompts=20)
    for prompt in [task.prompt(i) for i in range(20)] + [task.eval_prompt(i) for i in range(task.num_eval_prompts)]:
        assert len(prompt.text) == 2 * digits + 2
        assert len(prompt.truth) == digits + 1
        assert sum(numbers(prompt.text)) == int(prompt.truth[::-1])


def test_only_the_answer_itself_is_right():
    assert verify("701", "701") == 1.0
    for wrong in ("107", "70", "7010", "701 ", ""):
        assert verify(wrong, "701") == 0.0


def test_training_and_held_out_prompts_share_no_pair():
    # Two digits: 10,000 pairs, so that overlapping draws would be certain to meet.
    task = arithmetic(digits=2, num_prompts=8000, eval_prompts=800)
    train = [task.prompt(i).text for i in range(8000)]
    held_out = [task.eval_prompt(i).text for i in range(task.num_eval_prompts)]
    assert len(held_out) == 800
    assert len(set(train)) == 8000
    assert len(set(held_out)) == 800
    assert not set(train) & set(held_out)


def test_the_held_out_side_of_a_pair_does_not_change():
    # Kept here by value: a base model was trained on the other side of this split.
    assert [pair for pair in product(range(5), range(20)) if is_held_out(*pair)] == [
        (0, 0),
        (1, 4),
        (1, 9),
        (1, 11),
        (2, 1),
        (2, 6),
        (2, 11),
        (2, 19),
        (3, 1),
        (3, 2),
        (3, 3),
        (3, 5),
        (3, 10),
    ]
    share = sum(is_held_out(a, b) for a, b in product(range(200), range(200))) / 200**2
    assert share == pytest.approx(0.1, abs=0.01)


def test_the_seed_chooses_the_training_prompts_and_never_the_held_out_ones():
    first, again, other = arithmetic(seed=1), arithmetic(seed=1), arithmetic(seed=2)
    assert [first.prompt(i) for i in range(100)] == [again.prompt(i) for i in range(100)]
    assert first.prompt(0) != other.prompt(0)
    assert [first.eval_prompt(i) for i in range(50)] == [other.eval_prompt(i) for i in range(50)]


def test_fewer_held_out_pairs_than_asked_for_are_all_taken():
    task = arithmetic(digits=1, num_prompts=10, eval_prompts=512)
    assert task.num_eval_prompts == sum(is_held_out(a, b) for a, b in product(range(10), range(10)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"digit": 3}, "task.options.digit is no option of task.name=arithmetic.*did you mean digits?"),
        ({"digits": 0}, "task.options.digits=0 must be an integer, between 1 and 9"),
        ({"digits": 10}, "task.options.digits=10 must be an integer, between 1 and 9"),
        ({"digits": "3"}, "task.options.digits=3 must be an integer"),
        ({"digits": True}, "task.options.digits=True must be an integer"),
        ({"num_prompts": 0}, "task.options.num_prompts=0 must be an integer, at least 1"),
        ({"digits": 1, "num_prompts": 100}, "num_prompts=100, but task.options.digits=1 gives only .* raise digits"),
    ],
)
def test_an_impossible_option_names_value_and_fix(options, message):
    with pytest.raises(ValueError, match=message):
        arithmetic(**options)


def test_the_factory_passes_options_seed_and_held_out_prompts_on():
    config = TaskConfig(options={"digits": 2, "num_prompts": 30}, eval_prompts=7)
    task = make_task(config, seed=5)
    assert (task.num_prompts, task.num_eval_prompts) == (30, 7)
    assert task.prompt(3) == arithmetic(seed=5, digits=2, num_prompts=30).prompt(3)
    assert resolve_reward(task.reward) is verify


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("nowhere:score", r"task\.reward=nowhere:score: there is no module nowhere; looked in .* correct the name"),
        ("tests.nowhere.at_all:score", r"there is no module tests\.nowhere;"),
        ("tests.rollout.sample_rewards:missing", r"sample_rewards\.py\) has no function missing"),
        ("tests.rollout.sample_rewards:LENGTH", "LENGTH is of type int, not a function"),
        ("tests.rollout.broken_reward:score", r"cannot be imported \(RuntimeError: no licence file\)"),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_with_the_configuration(reward, message):
    with pytest.raises(ValueError, match=message):
        make_task(TaskConfig(reward=reward), seed=0)


@pytest.mark.parametrize("reward", ["score", ":score", "module:", "module:a.b"])
def test_a_reward_is_written_as_module_and_function(reward):
    with pytest.raises(ValueError, match="must have the form module:function"):
        resolve_reward(reward)


def test_a_module_whose_own_import_is_missing_is_not_called_missing_itself(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"module needs_more cannot be imported .*not_installed_anywhere"):
        resolve_reward("needs_more:score")


def test_a_reward_in_the_working_directory_is_found(tmp_path, monkeypatch):
    (tmp_path / "reward_of_mine.py").write_text("def score(response, truth):\n    return 1.0\n")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.chdir(tmp_path)
    assert resolve_reward("reward_of_mine:score")("a", None) == 1.0


def test_a_task_needs_no_framework():
    code = (
        "import sys\nfrom rollout.config import TaskConfig\nfrom rollout.tasks.factory import make_task\n"
        "make_task(TaskConfig(), seed=0)\n"
        "heavy = ('datasets', 'math_verify', 'pyarrow', 'ray', 'sympy', 'torch', 'transformers', 'vllm')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
