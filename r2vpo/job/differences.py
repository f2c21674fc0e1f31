"""What a learner step recorded and what it gives when it is computed again: metric by metric, and in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXACT_ROUNDING, COARSE_ROUNDING = 1e-6, 5e-2
"""Largest relative difference that counts as the same: float32 on a CPU; bfloat16, or any type on a GPU."""
FLOOR = 1e-9
"""Absolute difference that always counts as the same: a V of rounding noise has no relative precision."""
SHOWN = (
    "train/groups",
    "train/stale_groups",
    "train/tokens",
    "train/stale_tokens",
    "train/lag_mean",
    "train/lag_max",
    "train/reward_mean",
    "step/lr",
    "step/loss",
    "step/entropy",
    "dual/second_moment",
    "dual/second_moment_max",
    "step/grad_norm",
    "dual/lambda",
    "control/scale",
    "learner/bad_steps",
    "ratio/second_moment",
    "ratio/ess",
    "ratio/kl",
)
"""Metrics of the table, in the order in which one follows from the other; those that differ come in any case."""
_OF_BATCH = frozenset(
    f"train/{name}"
    for name in (
        "groups",
        "stale_groups",
        "tokens",
        "stale_tokens",
        "trajectories",
        "without_verdict",
        "zero_signal_fraction",
        "lag_mean",
        "lag_max",
        "reward_mean",
        "reward_min",
        "reward_max",
    )
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One metric of one step, recorded and computed again. None is a number that JSON cannot hold, or no number."""

    name: str
    recorded: float | None
    recomputed: float | None
    allowed: float
    """Largest absolute difference that counts as the same."""

    @property
    def difference(self) -> float:
        """Recomputed minus recorded; NaN where one of them is None and the other is not."""
        if self.recorded is None and self.recomputed is None:
            return 0.0
        if self.recorded is None or self.recomputed is None:
            return math.nan
        return self.recomputed - self.recorded

    @property
    def relative(self) -> float:
        """|difference| by |recorded|; infinite where that is 0 or not there."""
        if self.is_identical:
            return 0.0
        return abs(self.difference / self.recorded) if self.recorded and self.recomputed is not None else math.inf

    @property
    def is_identical(self) -> bool:
        """Whether both are the same number, to the last bit."""
        return self.difference == 0

    @property
    def is_same(self) -> bool:
        """Whether the difference is within what rounding explains."""
        return abs(self.difference) <= self.allowed

    @property
    def is_of_batch(self) -> bool:
        """Whether the metric says what was trained on, rather than what came of it."""
        return self.name in _OF_BATCH

    @property
    def verdict(self) -> str:
        """``identical``, ``same`` or ``DIFFERS``."""
        return "identical" if self.is_identical else "same" if self.is_same else "DIFFERS"

    def __str__(self) -> str:
        size = "" if math.isinf(self.relative) else f", {self.relative:.1e} relative"
        return f"{self.name} {number(self.recorded)} recorded, {number(self.recomputed)} recomputed{size}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All readings of one step, in the order in which one follows from the other."""

    step: int
    readings: tuple[Reading, ...]

    @property
    def differing(self) -> tuple[Reading, ...]:
        """The readings that rounding does not explain."""
        return tuple(r for r in self.readings if not r.is_same)

    @property
    def is_same(self) -> bool:
        """Whether no reading differs."""
        return not self.differing

    @property
    def num_identical(self) -> int:
        """Readings that are the same to the last bit."""
        return sum(r.is_identical for r in self.readings)

    @property
    def worst(self) -> Reading:
        """The reading with the largest relative difference."""
        return max(self.readings, key=lambda r: r.relative)


def compare(step: int, *, recorded: Mapping[str, Any], recomputed: Mapping[str, Any], rounding: float) -> Comparison:
    """Compare what the learner said at ``step``, then and now; ``recorded`` may hold the metrics of others, too.

    Times are left out, and what has no room, such as ``step``, the number. Figures of the batch and counts must be
    equal; for everything else ``rounding`` is relative, to |recorded|, for the loss to 1 if that is more: it is a
    difference of large sums.
    """
    rooms = {_room(name) for name in recomputed}
    names = [name for name in recorded if _room(name) in rooms]
    names += [name for name in recomputed if name not in recorded]
    compared = [name for name in names if "/" in name and _room(name) != "time"]
    readings = (_reading(name, recorded.get(name), recomputed.get(name), rounding) for name in compared)
    return Comparison(step=step, readings=tuple(sorted(readings, key=_order)))


def first_difference(comparisons: Sequence[Comparison]) -> Comparison | None:
    """The earliest step that is not the same."""
    return next((c for c in comparisons if not c.is_same), None)


def table(comparison: Comparison, *, width: int) -> str:
    """The readings that matter most, and all that differ: one line each, at most ``width`` characters."""
    shown = [r for r in comparison.readings if r.name in SHOWN or not r.is_same]
    rows = [("metric", "recorded", "recomputed", "difference", "")]
    rows += [(r.name, number(r.recorded), number(r.recomputed), _signed(r), r.verdict) for r in shown]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in lines)


def closing(comparisons: Sequence[Comparison], *, origin: str, rounding: float) -> str:
    """One sentence on the last step, which was computed from ``origin`` through all the others."""
    last, wrong = comparisons[-1], first_difference(comparisons)
    through = f"step {last.step}, recomputed from {origin}"
    if len(comparisons) > 1:
        through += f" through {len(comparisons)} steps"
    total = len(last.readings)
    if wrong is None:
        if all(c.num_identical == len(c.readings) for c in comparisons):
            return f"{through}, is the same: all {total} metrics are identical to the last bit"
        at, worst = max(((c.step, c.worst) for c in comparisons), key=lambda entry: entry[1].relative)
        return f"{through}, is the same within {rounding:g}: largest difference at step {at}, {worst}"
    reason = f"the batch is not the one that was recorded: {wrong.differing[0]}"
    if not wrong.differing[0].is_of_batch:
        reason = f"on the same batch, {wrong.differing[0]}"
    if last.is_same:
        return f"{through}, is the same within {rounding:g}, but step {wrong.step} on the way differs: {reason}"
    where = "" if wrong is last else f"; first at step {wrong.step}"
    return f"{through}, DIFFERS in {len(last.differing)} of {total} metrics{where}: {reason}"


def number(value: float | None) -> str:
    """A number with seven digits; a dash for none."""
    return "–" if value is None else f"{value:.7g}"


def _signed(reading: Reading) -> str:
    if reading.is_identical:
        return "0"
    return "–" if math.isnan(reading.difference) else f"{reading.difference:+.1e}"


def _reading(name: str, recorded: float | None, recomputed: float | None, rounding: float) -> Reading:
    if recomputed is not None and not math.isfinite(recomputed):
        recomputed = None  # as metrics.jsonl has it
    is_count = name in _OF_BATCH or name.endswith("/tokens") or _room(name) == "learner"
    size = max(abs(recorded or 0.0), 1.0 if name == "step/loss" else 0.0)
    allowed = FLOOR if is_count else max(rounding * size, FLOOR)
    return Reading(name=name, recorded=recorded, recomputed=recomputed, allowed=allowed)


def _order(reading: Reading) -> tuple[bool, int, str]:
    position = SHOWN.index(reading.name) if reading.name in SHOWN else len(SHOWN)
    return not reading.is_of_batch, position, reading.name


def _room(name: str) -> str:
    return name.partition("/")[0]
