"""``r2vpo replay verify --deep``: store, checkpoints, metrics and settings of a run, held against each other.

    history.jsonl ──▶ what binds each step ──┐
    checkpoints/ ──▶ where a resume begins ──┼─▶ replay.audit ──▶ Audit ─┐
    replay/ ─────────────────────────────────┘                          ├─▶ lines for a person, or JSON
    checkpoints/, metrics.jsonl, summary.json ──▶ do they agree with it ┘

Works on a run that goes on, one that was killed, and one that has ended; nothing is written.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from r2vpo.job.config import RunConfig, load_config
from r2vpo.job.history import read_starts
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError
from replay.audit import ACKNOWLEDGED, RULES, Audit, Violation, audit_store
from replay.audit_rules import Order, StepSettings

CHECKPOINTS, METRICS = "checkpoints", "metrics"
ALL_RULES = {
    **RULES,
    CHECKPOINTS: "every complete checkpoint can be read, and is one of committed steps",
    METRICS: "metrics have the committed steps in order, each once, with the batches of the log",
}
MOST_SHOWN = 20
"""Violations of one rule that are printed; all of them are counted, and in the JSON."""
_SETTLE_S = 1.0
"""Before a run that goes on is looked at a second time (seconds)."""
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint as its files say it."""

    step: int
    state: Mapping[str, Any]
    """trainer.json."""
    problem: str = ""
    """Why it is not whole, if it is not; ``state`` is empty then."""


def audit_run(
    run: RunDir, *, acknowledged: Path | None = None, progress: Callable[[str], None] = lambda what: None
) -> Audit:
    """Look at all of it. ``ReplayError`` if the run has no store to read, ``ConfigError`` for a record that is none."""
    keys, notes = ([], []) if acknowledged is None else read_acknowledged(acknowledged)
    settings, order, unknown = _what_binds(run)

    def looked_at() -> Audit:
        # What is written after a step is read before the log, and what is written before a checkpoint after it.
        checkpoints = list(read_checkpoints(run.checkpoints))
        rows, broken = read_rows(run.metrics)
        audit = audit_store(
            run.replay,
            settings=settings,
            # A checkpoint that has come since lets go of more, none of less.
            resume_step=lambda: max((c.step for c in read_checkpoints(run.checkpoints)), default=0),
            order=order,
            acknowledged=None if acknowledged is None else keys,
            progress=progress,
        )
        found = [Violation(rule=CHECKPOINTS, sentence=s) for s in _checkpoint_faults(checkpoints, rows, audit)]
        found += [Violation(rule=METRICS, sentence=s) for s in broken]
        found += [Violation(rule=METRICS, sentence=s) for s in _metric_faults(checkpoints, rows, audit)]
        if run.runner() is None:
            found += [Violation(rule=METRICS, sentence=s) for s in _end_faults(run, rows, audit)]
        return replace(audit, violations=(*audit.violations, *found), notes=(*unknown, *notes, *audit.notes))

    audit = looked_at()
    if audit.violations and run.runner() is not None:
        # Files are read one after the other: a rewind or a checkpoint may have come in between. What is wrong stays so.
        time.sleep(_SETTLE_S)
        again = looked_at()
        lasting = set(audit.violations)
        audit = replace(again, violations=tuple(v for v in again.violations if v in lasting))
    return audit


def lines_of(name: str, audit: Audit, *, quiet: bool = False) -> Iterator[str]:
    """The audit for a person; ``quiet``: violations alone."""
    found = Counter(violation.rule for violation in audit.violations)
    if not quiet:
        yield (
            f"{name}: {audit.version} steps, {audit.num_groups} groups ({audit.num_payloads} payloads read, "
            f"{audit.num_evicted} evicted), trained on {audit.num_trained} times"
        )
        for rule, sentence in ALL_RULES.items():
            verdict = f"{found[rule]} WRONG" if found[rule] else "not checked" if rule in audit.skipped else "holds"
            yield f"  {verdict:<12} {sentence}"
    for rule in ALL_RULES:
        sentences = [violation.sentence for violation in audit.violations if violation.rule == rule]
        yield from (f"{rule}: {sentence}" for sentence in sentences[:MOST_SHOWN])
        if len(sentences) > MOST_SHOWN:
            yield f"{rule}: and {len(sentences) - MOST_SHOWN} more"
    if not quiet:
        number = len(audit.violations)
        left_out = [rule for rule in audit.skipped if rule != ACKNOWLEDGED]
        unknown = f", as far as it could be checked: not {', '.join(left_out)}" if left_out else ""
        yield f"{name}: " + (f"{number} violation{'s' * (number != 1)}" if number else "everything holds") + unknown


def as_json(name: str, audit: Audit) -> dict[str, Any]:
    """The audit as a JSON value."""
    found = Counter(violation.rule for violation in audit.violations)
    about = asdict(audit)
    return {
        "run": name,
        "ok": not audit.violations,
        "rules": {
            rule: {"holds": None if rule in audit.skipped else not found[rule], "what": sentence}
            for rule, sentence in ALL_RULES.items()
        },
        **{key: about[key] for key in ("version", "num_groups", "num_payloads", "num_evicted", "num_trained")},
        "violations": about["violations"],
        "notes": about["notes"],
    }


def read_acknowledged(path: Path) -> tuple[list[str], list[str]]:
    """Keys, one a line, and notes. A last line without an end may be half a key, and is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--acknowledged {path} cannot be read: {error}") from error
    *lines, last = text.split("\n")
    notes = [f"the last line of {path} has no end and is left out: {last}"] if last.strip() else []
    return [line.strip() for line in lines if line.strip()], notes


def read_checkpoints(directory: Path) -> Iterator[Checkpoint]:
    """The complete ones, oldest first; one that is removed meanwhile is left out."""
    named = sorted((path.name, path) for path in directory.glob("step-*") if _NAME.fullmatch(path.name))
    for name, path in named:
        if not (path / "COMPLETE").is_file():
            continue
        step = int(name.removeprefix("step-"))
        try:
            found = Checkpoint(step=step, state=_state_of(path))
        except OSError as error:
            found = Checkpoint(step=step, state={}, problem=f"{Path(error.filename).name} cannot be read")
        except (ValueError, TypeError, AttributeError) as error:
            found = Checkpoint(step=step, state={}, problem=str(error))
        if (path / "COMPLETE").is_file():
            yield found


def _state_of(path: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint whose files are all there, as its marker lists them."""
    try:
        marker = json.loads((path / "COMPLETE").read_text())
        lengths, checksum = dict(marker["lengths"]), int(marker["state_crc32"])
    except (ValueError, TypeError, KeyError):
        raise ValueError("its COMPLETE is none") from None
    for name, length in lengths.items():
        size = (path / name).stat().st_size
        if size != length:
            raise ValueError(f"{name} has {size} bytes, not {length}")
    content = (path / "trainer.json").read_bytes()
    if crc32(content) != checksum:
        raise ValueError("the checksum of its trainer.json differs")
    return json.loads(content)


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The objects of metrics.jsonl, and sentences on lines that are none; a last line without an end is not counted."""
    if not path.exists():
        return [], []
    rows: list[dict[str, Any]] = []
    broken: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            broken.append(f"{path.name}, line {number} is not the metrics of a step: {line[:80]!r}")
    return rows, broken


def _what_binds(run: RunDir) -> tuple[list[StepSettings], Order | None, list[str]]:
    """The settings of every start, the order of the prompts as far as it is known, and notes on what is not."""
    try:
        starts = read_starts(run)
        configs = [(start.step, start.started_s, start.config()) for start in starts]
        if not starts:
            configs = [(0, 0.0, load_config(run.config))]
    except (ConfigError, ValueError, TypeError) as error:
        return [], None, [f"what bound the steps is not known, so that bounds are not checked: {error}"]
    notes = [] if starts else [f"{run.path} has no history.jsonl: config.yaml is taken for the settings of every step"]
    numbers = {start.num_prompts for start in starts} or {None}
    known = numbers.pop() if len(numbers) == 1 else None
    if known is None:
        notes.append("how many prompts the task had is not known, or changed: their order is not checked")
    order = None if known is None else Order(seed=configs[0][2].seed, num_prompts=known)
    return [_binding(step, started_s, config) for step, started_s, config in configs], order, notes


def _binding(step: int, started_s: float, config: RunConfig) -> StepSettings:
    replay = config.replay
    evicting = (replay.evict_after_lag, replay.max_uses, replay.capacity_groups, replay.capacity_gb)
    return StepSettings(
        first_step=step,
        started_s=started_s,
        max_lag=replay.max_lag,
        max_replay_lag=replay.max_replay_lag,
        min_verdicts=replay.min_verdicts,
        groups_per_step=config.learner.groups_per_step,
        num_fresh=None if replay.sample == "window" else config.num_fresh,
        max_outstanding=config.num_fresh * (replay.max_lag + 1),
        may_evict=any(setting is not None for setting in evicting),
    )


def _checkpoint_faults(
    checkpoints: Sequence[Checkpoint], rows: Sequence[Mapping[str, Any]], audit: Audit
) -> Iterator[str]:
    for checkpoint in checkpoints:
        about = f"checkpoint step-{checkpoint.step:06d}"
        if checkpoint.problem:
            yield f"{about} is marked as complete, but {checkpoint.problem}"
            continue
        if checkpoint.step > audit.version:
            yield f"{about} holds the state after {checkpoint.step} steps, but {audit.version} are committed"
        if checkpoint.state.get("version") != checkpoint.step:
            yield f"{about} says that its version is {checkpoint.state.get('version')}"
        earlier = [row.get("learner/optimizer_steps") for row in rows if row["step"] < checkpoint.step]
        counted, taken = sum(n for n in earlier if n is not None), checkpoint.state.get("optimizer_steps")
        if taken is not None and len(earlier) == checkpoint.step and None not in earlier and counted != taken:
            yield f"{about} has taken {taken} optimiser steps, the metrics before it count {counted:.0f}"


def _metric_faults(checkpoints: Sequence[Checkpoint], rows: Sequence[Mapping[str, Any]], audit: Audit) -> Iterator[str]:
    steps = [row["step"] for row in rows]
    times = Counter(steps)
    for step, count in times.items():
        if count > 1:
            yield f"step {step} is there {count} times"
    last = max(steps, default=-1)
    missing = [step for step in range(last + 1) if step not in times]
    if missing:
        yield f"{_steps(missing)} missing, but step {last} is there"
    if not missing and steps != sorted(steps):
        yield "steps are not in their order"
    if last >= audit.version:
        yield f"step {last} is there, but only steps before {audit.version} are committed"
    # A step's metrics are written before the checkpoint that follows it; those of a run that was killed may end there.
    newest = max((checkpoint.step for checkpoint in checkpoints), default=0)
    if last + 1 < newest:
        yield f"{_steps(range(last + 1, newest))} missing, although checkpoint step-{newest:06d} was written after it"
    for row in rows:
        recorded = (row.get("train/groups"), row.get("train/stale_groups"))
        logged = audit.batches.get(row["step"])
        if None not in recorded and logged is not None and recorded != logged:
            yield (
                f"step {row['step']} trained on {recorded[0]:.0f} groups, {recorded[1]:.0f} of them stale; the log has "
                f"{logged[0]} and {logged[1]}"
            )


def _end_faults(run: RunDir, rows: Sequence[Mapping[str, Any]], audit: Audit) -> Iterator[str]:
    """A run that has come to its own end has the metrics of every committed step."""
    try:
        status = json.loads(run.summary.read_text(encoding="utf-8"))["status"]
    except (OSError, ValueError, LookupError):
        return
    recorded = max((row["step"] for row in rows), default=-1) + 1
    if status == "finished" and recorded < audit.version:
        yield f"{_steps(range(recorded, audit.version))} missing, although the run has finished"


def _steps(steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]} is"
    return f"steps {', '.join(map(str, steps[:8]))}{f' and {len(steps) - 8} more' if len(steps) > 8 else ''} are"
