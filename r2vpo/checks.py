"""Checks of settings whose messages say what was given, what is allowed, and thereby what to do."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches


class require:  # noqa: N801 - reads as a verb: require.positive("learner.lr", lr)
    """Each check raises ``ValueError`` naming key, value and what is allowed."""

    @staticmethod
    def one_of(key: str, value: str, allowed: Sequence[str]) -> None:
        """``value`` is one of ``allowed``."""
        if value not in allowed:
            near = get_close_matches(str(value), allowed, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{key}={value} is not one of {', '.join(allowed)}{hint}")

    @staticmethod
    def positive(key: str, value: float) -> None:
        """``value`` > 0."""
        if not value > 0:
            raise ValueError(f"{key}={value} must be greater than 0")

    @staticmethod
    def at_least(key: str, value: float, low: float) -> None:
        """``value`` >= ``low``."""
        if not value >= low:
            raise ValueError(f"{key}={value} must be at least {low}")

    @staticmethod
    def between(key: str, value: float, low: float, high: float) -> None:
        """``low`` <= ``value`` <= ``high``."""
        if not low <= value <= high:
            raise ValueError(f"{key}={value} must lie between {low} and {high}")

    @staticmethod
    def share(key: str, value: float) -> None:
        """0 <= ``value`` < 1."""
        if not 0 <= value < 1:
            raise ValueError(f"{key}={value} must be at least 0 and below 1")
