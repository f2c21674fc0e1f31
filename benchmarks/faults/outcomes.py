"""What drills have shown: kept run by run, and added up to rows."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.faults.roles import Drill
from benchmarks.table import Row, at_least, at_most, reported
from replay.audit import ACKNOWLEDGED


@dataclass(kw_only=True)
class Outcome:
    """What a drill has shown. What does not apply to its role is None."""

    drill: Drill
    went_on: bool = False
    """Whether the run did, cured."""
    in_phase: bool = False
    """Whether the phase was seen when the fault came."""
    step: int = 0
    """Learner steps before it."""
    cured_s: float | None = None
    """From the signal to the run's going on."""
    replaced: float | None = None
    """Seconds from a worker's death to its successor's weights, by those of the first start in the same run."""
    stepped_meanwhile: bool | None = None
    """Whether the learner did while the worker was replaced."""
    steps_lost: int | None = None
    """Learner steps that a learner's death undid, of those that a checkpoint held."""
    steps_redone: int | None = None
    """Learner steps that it undid in all."""


@dataclass(kw_only=True)
class DrilledRunResult:
    """What a run has shown from its start to its end."""

    outcomes: list[Outcome] = field(default_factory=list)
    has_ended: bool = False
    """Whether it reached its target step with exit code 0."""
    violations: dict[str, int] = field(default_factory=dict)
    """By the audit's rule."""
    took_s: float = 0.0


def keep(result: DrilledRunResult, file: Path) -> None:
    """Add a line to the file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = file.read_text() if file.exists() else ""
    written = file.with_suffix(".tmp")
    written.write_text(f"{lines}{json.dumps(asdict(result))}\n")
    written.rename(file)


def kept(file: Path) -> list[DrilledRunResult]:
    """All runs of the file, in the order in which they were made; none if there is no file."""
    if not file.exists():
        return []
    return [_from_json(json.loads(line)) for line in file.read_text().splitlines()]


def _from_json(line: dict[str, Any]) -> DrilledRunResult:
    outcomes = [Outcome(**{**outcome, "drill": Drill(**outcome["drill"])}) for outcome in line["outcomes"]]
    return DrilledRunResult(**{**line, "outcomes": outcomes})


def figures(runs: Sequence[DrilledRunResult]) -> Iterator[Row]:
    """Rows of all runs."""
    outcomes = [outcome for run in runs for outcome in run.outcomes]
    yield at_least("drills: runs that reach their target step", _share([run.has_ended for run in runs]), "of all", 1.0)
    survived: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        survived[outcome.drill.name].append(outcome.went_on)
    for name, went_on in sorted(survived.items()):
        yield at_least(f"drills: {name}: the run went on", _share(went_on), f"of {len(went_on)}", 1.0)
    violations = sum((Counter(run.violations) for run in runs), Counter[str]())
    lost, twice = violations[ACKNOWLEDGED], violations["once"]
    yield at_most("drills: acknowledged groups lost", lost, "groups", 0)
    yield at_most("drills: groups trained twice in a step", twice, "groups", 0)
    yield at_most("drills: other violations", violations.total() - lost - twice, "", 0)
    if replaced := [o.replaced for o in outcomes if o.replaced is not None]:
        yield at_most("drills: worker killed to successor ready", median(replaced), "x cold start", 1.3)
        yield reported("drills: the same, the slowest", max(replaced), "x cold start")
        stepped = [bool(o.stepped_meanwhile) for o in outcomes if o.replaced is not None]
        yield at_least("drills: the learner stepped meanwhile", _share(stepped), "of these", 1.0)
    if lost_steps := [o.steps_lost for o in outcomes if o.steps_lost is not None]:
        redone = [o.steps_redone for o in outcomes if o.steps_redone is not None]
        yield at_most("drills: checkpointed steps undone by a learner's death", max(lost_steps), "steps", 0)
        yield reported("drills: steps undone by a learner's death", max(redone), "steps at most")
    yield reported("drills: faults", len(outcomes), "")
    yield reported("drills: faults whose phase was seen", _share([o.in_phase for o in outcomes]), "of all")


def _share(holds: Sequence[bool]) -> float:
    return sum(holds) / len(holds)
