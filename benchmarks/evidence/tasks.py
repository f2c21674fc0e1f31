"""The tasks: prompts and answers of one fixed length, as token ids.

| task | prompt | answer |
|---|---|---|
| addition(d) | two numbers of d digits | the d + 1 digits of the sum, last digit first |
| sorting(k) | k digits | the same digits in ascending order |

The reward is 1 if every token is right, else 0. The algorithm is tuned on addition; sorting is left alone until then.
Whether a prompt is held out is told by a hash, so that training never draws one.

Axes: ``_B`` prompts, ``_P`` their tokens, ``_n`` members, ``_T`` tokens of an answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

_HELD_OUT_SHARE = 16
"""One prompt in this many is held out."""


class Task(Protocol):
    """Prompts, and what an answer to them is worth."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens; ids are below it."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """Tokens of every prompt."""
        ...

    @property
    def answer_tokens(self) -> int:
        """Tokens of every answer."""
        ...

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Prompts, held out or not, int64 ``[count, P]``."""
        ...

    def solve(self, prompt_BP: np.ndarray) -> np.ndarray:
        """The right answer to each prompt, int64 ``[B, T]``."""
        ...


@dataclass(frozen=True)
class Addition:
    """``a + b =``, operands uniform in [0, 10^digits); tokens 0 to 9 are digits, 10 is +, 11 is =."""

    digits: int
    vocabulary: int = 12

    @property
    def prompt_tokens(self) -> int:
        return 2 * self.digits + 2

    @property
    def answer_tokens(self) -> int:
        return self.digits + 1

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        operands = rng.integers(0, 10, size=(2, count, self.digits))
        plus, equals = np.full((count, 1), 10), np.full((count, 1), 11)
        return np.concatenate([operands[0], plus, operands[1], equals], axis=1)

    def solve(self, prompt_BP: np.ndarray) -> np.ndarray:
        place_D = 10 ** np.arange(self.digits - 1, -1, -1)
        first, second = prompt_BP[:, : self.digits], prompt_BP[:, self.digits + 1 : -1]
        sum_B = first @ place_D + second @ place_D
        return sum_B[:, None] // 10 ** np.arange(self.answer_tokens) % 10


@dataclass(frozen=True)
class Sorting:
    """Digits uniform in [0, 9], in ascending order; token 10 ends the prompt."""

    count: int
    vocabulary: int = 11

    @property
    def prompt_tokens(self) -> int:
        return self.count + 1

    @property
    def answer_tokens(self) -> int:
        return self.count

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.concatenate([rng.integers(0, 10, size=(count, self.count)), np.full((count, 1), 10)], axis=1)

    def solve(self, prompt_BP: np.ndarray) -> np.ndarray:
        return np.sort(prompt_BP[:, :-1], axis=1)


def make_task(name: str) -> Task:
    """The task of a setting."""
    return {"addition4": Addition(4), "addition8": Addition(8), "sorting10": Sorting(10)}[name]


def rewards(task: Task, prompt_BP: np.ndarray, answer_BnT: np.ndarray) -> np.ndarray:
    """Rewards of all members, float64 ``[B, n]``."""
    return (answer_BnT == task.solve(prompt_BP)[:, None]).all(axis=2).astype(np.float64)


def prompts(task: Task, rng: np.random.Generator, count: int, *, held_out: bool) -> np.ndarray:
    """Prompts to train on, or held-out ones, int64 ``[count, P]``."""
    found: list[np.ndarray] = []
    while (missing := count - sum(map(len, found))) > 0:
        drawn = task.draw(rng, missing * (_HELD_OUT_SHARE if held_out else 2))
        found.append(drawn[is_held_out(drawn) == held_out][:missing])
    return np.concatenate(found)


def is_held_out(prompt_BP: np.ndarray) -> np.ndarray:
    """bool ``[B]``: a hash of the tokens decides (FNV-1a, with the finaliser of splitmix64 to mix the upper bits)."""
    hash_B = np.full(len(prompt_BP), 14695981039346656037, np.uint64)
    for token_B in prompt_BP.T.astype(np.uint64):
        hash_B = (hash_B ^ token_B) * np.uint64(1099511628211)
    hash_B = (hash_B ^ (hash_B >> np.uint64(30))) * np.uint64(13787848793156543929)
    hash_B ^= hash_B >> np.uint64(27)
    return hash_B % np.uint64(_HELD_OUT_SHARE) == 0
