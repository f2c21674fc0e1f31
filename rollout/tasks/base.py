"""What a task is, and how a reward is found.

A task is prompts with their ground truth, by position; the reward is named, not held: it runs in processes of its own
(`rollout/rewards.py`), which look it up by ``module:function``.

See docs/own-model-and-data.md.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

RewardFunction = Callable[[str, Any], float | None]
"""``(response, truth) -> reward``; None where the response cannot be judged."""


@dataclass(frozen=True, kw_only=True)
class TaskPrompt:
    """One prompt as the task knows it: no tokens yet."""

    text: str
    """What the policy is shown, before tokenisation and chat template."""
    truth: Any
    """Ground truth for the reward; a JSON value."""


class Task(Protocol):
    """Where prompts come from. The same configuration and seed give the same prompts on every machine."""

    @property
    def num_prompts(self) -> int:
        """Training prompts of one epoch."""
        ...

    @property
    def num_eval_prompts(self) -> int:
        """Held-out prompts; none of them is a training prompt."""
        ...

    @property
    def eval_sets(self) -> Mapping[str, Sequence[TaskPrompt]]:
        """Further held-out prompts, by the name of their set."""
        ...

    @property
    def reward(self) -> str:
        """The task's own reward, ``module:function``."""
        ...

    def prompt(self, index: int) -> TaskPrompt:
        """Training prompt ``index``, 0-based, below ``num_prompts``."""
        ...

    def eval_prompt(self, index: int) -> TaskPrompt:
        """Held-out prompt ``index``, 0-based, below ``num_eval_prompts``."""
        ...


def resolve_reward(reward: str) -> RewardFunction:
    """Import the function that ``module:function`` names; a module in the working directory is found too.

    Raises ``ValueError`` if the form is wrong, the module is missing or fails while it is imported, or holds no such
    function.
    """
    module_name, colon, name = reward.partition(":")
    if not (colon and module_name and name.isidentifier()):
        raise ValueError(f"task.reward={reward} must have the form module:function")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look there by itself
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # somebody else's module may raise anything while it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"task.reward={reward}: there is no module {error.name}; looked in the working directory "
                f"({os.getcwd()}) and among the installed packages; correct the name, or install it"
            ) from None
        raise ValueError(
            f"task.reward={reward}: module {module_name} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if name not in vars(module):
        raise ValueError(f"task.reward={reward}: module {module_name} ({module.__file__}) has no function {name}")
    function: RewardFunction = vars(module)[name]
    if not callable(function):
        raise ValueError(
            f"task.reward={reward}: {name} is of type {type(function).__name__}, not a function (response, truth) -> "
            "float or None"
        )
    _check_signature(reward, function)
    return function


def _check_signature(reward: str, function: RewardFunction) -> None:
    """``ValueError`` if ``function`` cannot be called with a response and a truth, or would answer with a coroutine."""
    if inspect.iscoroutinefunction(function):
        raise ValueError(f"task.reward={reward} is a coroutine (async def); make it a plain function")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins have none to look at
        return
    try:
        signature.bind("response", None)
    except TypeError as error:
        raise ValueError(
            f"task.reward={reward} takes {signature}, but is called with a response and a truth ({error}); give it "
            "two parameters"
        ) from None
