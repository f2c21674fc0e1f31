"""Addition with the digits reversed, least significant digit first: the quickstart's task, made up as it goes.

``12 + 95 = 107`` with two digits is shown as ``21+59=`` and answered by ``701``. Written this way a carry moves with
the direction of writing, so a model of a few hundred thousand parameters can learn it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from rollout.tasks.base import TaskPrompt

MAX_DIGITS = 9
WORD = (1 << 64) - 1
HELD_OUT_SHARE = 10
"""One pair of numbers in ten is held out."""
DEFAULTS = {"digits": 3, "num_prompts": 10_000}


class ArithmeticTask:
    """Pairs of numbers of up to ``digits`` digits, all different; which pairs are held out does not depend on the seed.

    Raises ``ValueError`` for an option that is unknown or out of range, and for more training prompts than pairs.
    """

    reward = "rollout.tasks.arithmetic:verify"

    def __init__(self, options: Mapping[str, Any], *, num_eval_prompts: int, seed: int) -> None:
        settings = _settings(options)
        self._digits = settings["digits"]
        num_prompts = settings["num_prompts"]
        self._train = _draw(random.Random(seed), self._digits, num_prompts, held_out=False)
        if len(self._train) < num_prompts:
            raise ValueError(
                f"task.options.num_prompts={num_prompts}, but task.options.digits={self._digits} gives only "
                f"{len(self._train)} different training prompts; lower num_prompts or raise digits"
            )
        # Not the run's seed: every run is measured on the same prompts.
        self._eval = _draw(random.Random(0), self._digits, num_eval_prompts, held_out=True)

    @property
    def num_prompts(self) -> int:
        """Training prompts of one epoch."""
        return len(self._train)

    @property
    def num_eval_prompts(self) -> int:
        """Held-out prompts: as many as asked for, or all there are."""
        return len(self._eval)

    @property
    def eval_sets(self) -> Mapping[str, Sequence[TaskPrompt]]:
        """None: its held-out prompts are all that there is."""
        return {}

    def prompt(self, index: int) -> TaskPrompt:
        """Training prompt ``index``."""
        return self._prompt(self._train[index])

    def eval_prompt(self, index: int) -> TaskPrompt:
        """Held-out prompt ``index``."""
        return self._prompt(self._eval[index])

    def _prompt(self, pair: tuple[int, int]) -> TaskPrompt:
        first, second = pair
        return TaskPrompt(
            text=f"{reversed_digits(first, self._digits)}+{reversed_digits(second, self._digits)}=",
            truth=reversed_digits(first + second, self._digits + 1),
        )


def verify(response: str, truth: str) -> float:
    """1 if the response is the answer and nothing else, otherwise 0."""
    return float(response == truth)


def reversed_digits(number: int, width: int) -> str:
    """The digits from the least significant one on, filled up with zeros: ``reversed_digits(12, 3) == "210"``."""
    return f"{number:0{width}d}"[::-1]


def is_held_out(first: int, second: int) -> bool:
    """Whether a pair belongs to the held-out tenth of all pairs: a hash of the pair, so the two sets are disjoint."""
    mixed = (first * 0x9E3779B97F4A7C15 & WORD) ^ (second * 0xC2B2AE3D27D4EB4F & WORD)
    mixed ^= mixed >> 29
    mixed = mixed * 0xBF58476D1CE4E5B9 & WORD
    mixed ^= mixed >> 32
    return mixed % HELD_OUT_SHARE == 0


def _draw(rng: random.Random, digits: int, count: int, *, held_out: bool) -> list[tuple[int, int]]:
    """``count`` different pairs on one side of the split, or all there are."""
    base = 10**digits
    # More than enough by the law of large numbers where the space is large; everything where it is small.
    num_drawn = min(base * base, count * (2 * HELD_OUT_SHARE if held_out else 2) + 1000)
    return list(_first(count, (divmod(p, base) for p in rng.sample(range(base * base), num_drawn)), held_out))


def _first(count: int, pairs: Iterator[tuple[int, int]], held_out: bool) -> Iterator[tuple[int, int]]:
    for pair in pairs:
        if count == 0:
            return
        if is_held_out(*pair) == held_out:
            count -= 1
            yield pair


def _settings(options: Mapping[str, Any]) -> dict[str, int]:
    for name in options:
        if name not in DEFAULTS:
            near = get_close_matches(name, DEFAULTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"task.options.{name} is no option of task.name=arithmetic, which has {', '.join(DEFAULTS)}{hint}"
            )
    settings = {**DEFAULTS, **options}
    for name, high in (("digits", MAX_DIGITS), ("num_prompts", None)):
        value = settings[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (high is not None and value > high):
            allowed = "at least 1" if high is None else f"between 1 and {high}"
            raise ValueError(f"task.options.{name}={value} must be an integer, {allowed}")
    return settings
