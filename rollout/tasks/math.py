"""Mathematical answers, judged by math-verify: is the response's answer equal to the ground truth as mathematics?

Importing this module takes a second (sympy); the reward's process does it once, before its first verdict.
"""

from __future__ import annotations

from typing import Any

import math_verify


def verify(response: str, truth: Any) -> float | None:
    """1 if the answer in ``response`` equals ``truth``, 0 if not or if there is none; None if ``truth`` is no answer.

    ``truth`` is a number, bare LaTeX such as ``\\frac{1}{2}``, or text that holds its answer in ``$…$``, in
    ``\\boxed{…}`` or after ``####``; a list of these asks for all of them. math-verify's own timeouts are off: they
    need ``signal.alarm``, and the pool's deadline kills.
    """
    gold = _parse(_marked(_joined(truth) if isinstance(truth, list) else str(truth)))
    if all(isinstance(reading, str) for reading in gold):  # math-verify falls back to the text it could not read
        return None
    return float(math_verify.verify(gold, _parse(response), timeout_seconds=None))


def _joined(truths: list[Any]) -> str:
    """Several answers as one: math-verify reads ``1, 2`` as a list."""
    return ", ".join(str(truth).strip().strip("$") for truth in truths)


def _marked(truth: str) -> str:
    """A bare truth as a boxed one: of an unmarked ``3\\sqrt{2}`` math-verify would read the 3 alone."""
    truth = truth.rpartition("####")[2].strip()
    is_marked = any(mark in truth for mark in ("$", "\\boxed", "\\(", "\\["))
    return truth if is_marked or not truth else f"\\boxed{{{truth}}}"


def _parse(text: str) -> list[Any]:
    return math_verify.parse(text, parsing_timeout=None)  # type: ignore[arg-type]  # None turns it off
