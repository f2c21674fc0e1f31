"""An independent audit of a run's store: what must hold of it, worked out anew from the files alone.

    RUN/replay/*.sqlite3 ──read_tables──▶ Ledger ──▶ rules over groups, steps, epochs   ┐
                         ──payload by payload──────▶ bytes, tokens, versions, row       ├─▶ Audit
    settings of every start, acknowledged keys ─────▶ bounds, nothing lost              ┘

It shares no bookkeeping with what writes a store, only the names of its files and the place that a key's hash gives a
group. It reads a run that goes on, one that was killed, and one that has ended.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from replay import audit_rules as rules
from replay.audit_payload import Payload, parse, span_faults, token_faults
from replay.audit_rules import Ledger, Order, StepSettings
from replay.audit_tables import ShardTables, StoreTables, read_tables
from replay.database import clear_errors, reading, remove_empty_log
from replay.errors import ReplayError
from replay.rows import shard_of_key
from replay.schema import CONSUMPTION_FILE, shard_file

FILES, PAYLOADS, TOKENS, SPANS, ACKNOWLEDGED = "files", "payloads", "tokens", "spans", "acknowledged"
_TABLE_RULES: dict[str, Callable[[Ledger], Iterator[str]]] = {
    "keys": rules.keys_are_unique,
    "places": rules.groups_lie_in_their_shard,
    "steps": rules.steps_are_contiguous,
    "once": rules.no_group_twice_in_a_step,
    "fresh": rules.fresh_once,
    "uses": rules.uses_are_counted,
    "batches": rules.batches_are_whole,
    "lags": rules.lags_are_bounded,
    "future": rules.nothing_from_the_future,
    "verdicts": rules.verdicts_suffice,
    "trained": rules.trained_groups_are_there,
    "aside": rules.set_aside_is_not_trained,
    "choice": rules.the_choice_is_next,
    "prompts": rules.no_prompt_is_skipped,
}
RULES = {
    FILES: "every file can be read, and SQLite finds it sound",
    "keys": "no prompt's key has two groups",
    "places": "every group lies in the shard that its id and its key name",
    "steps": "committed steps are 0, 1, 2, …, and no other step consumed anything",
    "once": "no step trained on a group twice",
    "fresh": "a group was trained as fresh once at most, and only by the first step that trained on it",
    "uses": "earlier uses of a group are counted right",
    "batches": "every batch has the fresh groups and the size that the settings ask for",
    "lags": "no group was trained at a lag above the bound of its kind",
    "future": "no step trained on a token of a later version",
    "verdicts": "every group that was trained on has enough verdicts",
    "trained": "every group that was trained on is there, or was lawfully evicted",
    "aside": "no step trained on what was set aside as ahead",
    "choice": "the batch in work is that of the next step",
    "prompts": "prompts are answered in their order, each once, none passed over",
    PAYLOADS: "every payload is there, intact, and says what its row says",
    TOKENS: "every sampled token has a finite log-prob and a version, and no other token has one",
    SPANS: "versions never fall within a trajectory, and no token is older than its lease",
    ACKNOWLEDGED: "every acknowledged group is there",
}
"""What is looked at: rule → what must hold."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """Something that must hold and does not."""

    rule: str
    """One of ``RULES``, or of the caller's own."""
    sentence: str
    """What is wrong, with ids, keys and steps."""


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What was looked at, and what was found."""

    version: int
    """Number of the next learner step."""
    num_groups: int
    num_payloads: int
    """Payloads that were read."""
    num_evicted: int
    num_trained: int
    """Groups trained on, each use counted."""
    batches: Mapping[int, tuple[int, int]]
    """Committed step → its groups, and how many of these were stale."""
    violations: tuple[Violation, ...]
    notes: tuple[str, ...]
    """What was not looked at, and what is not as one would wish though lawful."""
    skipped: tuple[str, ...] = ()
    """Rules for which something that they need was not given."""


def audit_store(
    directory: Path,
    *,
    settings: Sequence[StepSettings],
    resume_step: Callable[[], int],
    order: Order | None = None,
    acknowledged: Collection[str] | None = None,
    progress: Callable[[str], None] = lambda what: None,
) -> Audit:
    """Look at everything in ``directory`` (RUN/replay). ``ReplayError`` if it holds no log that can be read.

    Args:
        settings: those of every start, in the order of time; with none, no bound is checked.
        resume_step: the step that the run would be resumed at; asked after the tables are read.
        order: that of the prompts; None checks it not.
        acknowledged: keys whose appends returned, by a record apart from the store; None checks none.
        progress: told what is looked at next.
    """
    try:
        return _Auditor(directory, progress).look(
            settings=settings, resume_step=resume_step, order=order, acknowledged=acknowledged
        )
    finally:
        for path in (directory / CONSUMPTION_FILE, *directory.glob("shard-*.sqlite3")):
            remove_empty_log(path)


class _Auditor:
    def __init__(self, directory: Path, progress: Callable[[str], None]) -> None:
        self._directory, self._progress = directory, progress
        self._violations: list[Violation] = []
        self._notes: list[str] = []
        self._num_payloads = 0

    def look(
        self,
        *,
        settings: Sequence[StepSettings],
        resume_step: Callable[[], int],
        order: Order | None,
        acknowledged: Collection[str] | None,
    ) -> Audit:
        self._progress("reading the tables")
        tables = read_tables(self._directory)
        ledger = Ledger(tables, settings=settings, order=order, resume_step=resume_step())
        self._look_at_files(tables)
        for name, rule in _TABLE_RULES.items():
            self._add(name, rule(ledger))
        if acknowledged is not None:
            self._add(ACKNOWLEDGED, self._lost(ledger, acknowledged))
        trained = set(ledger.uses["group_id"].tolist())
        for shard in tables.shards.values():
            self._look_at_payloads(shard, trained=trained, aside=tables.log.aside)
        skipped = [] if settings else ["batches", "lags", "verdicts"]
        skipped += [] if settings and order else ["prompts"]
        skipped += [] if acknowledged is not None else [ACKNOWLEDGED]
        return Audit(
            version=ledger.version,
            num_groups=len(ledger.groups),
            num_payloads=self._num_payloads,
            num_evicted=int((~np.isnan(ledger.groups["evicted_s"])).sum()),
            num_trained=len(ledger.uses),
            batches=_batches(ledger),
            violations=tuple(self._violations),
            notes=tuple(self._notes),
            skipped=tuple(skipped),
        )

    def _add(self, rule: str, sentences: Iterator[str]) -> None:
        self._violations += [Violation(rule=rule, sentence=sentence) for sentence in sentences]

    def _look_at_files(self, tables: StoreTables) -> None:
        self._add(FILES, iter(tables.unreadable.values()))
        for shard, host in tables.missing.items():
            where = f"it lies on host {host}" if host else "it may lie on another host"
            self._notes.append(f"{shard_file(shard)} is not here, {where}: its groups were not looked at")
        for path in (self._directory / CONSUMPTION_FILE, *(shard.path for shard in tables.shards.values())):
            self._progress(f"checking {path.name} ({path.stat().st_size / 1e6:,.0f} MB)")
            self._add(FILES, _unsound(path))

    def _lost(self, ledger: Ledger, acknowledged: Collection[str]) -> Iterator[str]:
        known, elsewhere = set(ledger.keys), 0
        for key in acknowledged:
            try:
                shard = shard_of_key(key, ledger.shards)
            except ValueError as error:
                yield f"the record of acknowledged groups is not one: {error}"
                continue
            if shard not in ledger.tables.shards:
                elsewhere += 1
            elif key not in known:
                yield f"the group of prompt {key} was acknowledged, but the store does not hold it"
        if elsewhere:
            self._notes.append(f"{elsewhere} acknowledged groups belong to shards that could not be looked at")

    def _look_at_payloads(self, shard: ShardTables, *, trained: Collection[int], aside: Mapping[int, str]) -> None:
        self._progress(f"reading the payloads of {shard.path.name}")
        for group_id in shard.orphans:
            self._add(PAYLOADS, iter([f"{shard.path.name} holds a payload of group {group_id}, but no such group"]))
        with reading(shard.path) as database:
            for key, row in zip(shard.keys, shard.groups, strict=True):
                group_id = int(row["id"])
                about = f"group {group_id} ({key})"
                group, problem = _read(shard.path, database, row)
                if problem and aside.get(group_id) == "damaged" and group_id not in trained:
                    self._notes.append(f"{about} was never trained on and is set aside as damaged: {problem}")
                elif problem:
                    self._add(PAYLOADS, iter([f"{about}: {problem}"]))
                if group is None:
                    continue
                self._num_payloads += 1
                self._add(PAYLOADS, (f"{about}: {fault}" for fault in _row_faults(group, key, row)))
                self._add(TOKENS, (f"{about}: {fault}" for fault in token_faults(group)))
                self._add(SPANS, (f"{about}: {fault}" for fault in span_faults(group)))


def _batches(ledger: Ledger) -> dict[int, tuple[int, int]]:
    steps, first = np.unique(np.sort(ledger.uses["step"]), return_index=True)
    sizes = np.diff(np.append(first, len(ledger.uses)))
    stale = Counter(ledger.uses["step"][~ledger.uses["is_fresh"]].tolist())
    return {step: (size, stale[step]) for step, size in zip(steps.tolist(), sizes.tolist(), strict=True)}


def _unsound(path: Path) -> Iterator[str]:
    try:
        with reading(path) as database, clear_errors(path):
            for (found,) in database.execute("PRAGMA integrity_check"):
                if found != "ok":
                    yield f"{path}: SQLite finds: {' '.join(found.split())}"
    except ReplayError as error:
        yield str(error)


def _read(path: Path, database: sqlite3.Connection, row: np.ndarray) -> tuple[Payload | None, str]:
    """What the payload of a row says, or None; and what is wrong with it."""
    group_id, was_evicted = int(row["id"]), not np.isnan(row["evicted_s"])
    try:
        with clear_errors(path):
            query = "SELECT payload, checksum FROM payloads WHERE group_id = ?"
            found = database.execute(query, (group_id,)).fetchone()
            # Beside a writer it may have been evicted since its row was read.
            now = database.execute("SELECT evicted_s FROM groups WHERE id = ?", (group_id,)).fetchone()
    except ReplayError as error:
        return None, f"its payload cannot be read: {error}"
    if found is None:
        return None, "" if was_evicted or (now is not None and now[0] is not None) else "its payload is missing"
    if was_evicted:
        return None, "it is marked as evicted, but its payload is there"
    payload, checksum = found
    if not isinstance(payload, bytes) or xxhash.xxh3_128_hexdigest(payload) != checksum:
        return None, "the bytes of its payload do not match their checksum"
    try:
        return parse(payload), ""
    except (ValueError, LookupError, TypeError) as error:
        return None, f"its payload is no group: {error}"


def _row_faults(group: Payload, key: str, row: np.ndarray) -> Iterator[str]:
    if group.key != key:
        yield f"its payload is that of prompt {group.key}"
    for name, said in group.columns().items():
        if row[name] != said:
            yield f"its row says {name}={row[name]}, its payload {said}"
