"""One shard's groups together with what became of them, by SQL over both files; for people who look at a run.

    shard-000.sqlite3  ──┐
                         ├─ one read-only connection ──▶ GroupInfo, ShardSummary, sentences about contradictions
    consumption.sqlite3 ─┘  (attached as ``log``)

Aggregates are computed by SQLite, so that a million groups never become a million Python objects. Every question is
answered from one snapshot of both files, the log's taken first: what was consumed then is in the shard now.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from r2vpo.records import Kind, Outcome
from replay.database import clear_errors, log_of, reading
from replay.errors import ReplayError

STATES = ("waiting", "chosen", "consumed", "late", "skipped", "ahead", "unscored", "damaged", "evicted")
"""What a group is at present; of several that apply, the one that decides whether it can still be trained on."""

PROMPT = np.dtype([("epoch", np.int64), ("index", np.int64)])
"""A prompt, as its key says it."""
# The second way to be skipped: too late to be trained as fresh, and never drawn as stale.
_STATE = """CASE
    WHEN g.evicted_s IS NOT NULL THEN 'evicted'
    WHEN (SELECT reason FROM log.set_aside a WHERE a.group_id = g.id) IN ('damaged', 'ahead')
        THEN (SELECT reason FROM log.set_aside a WHERE a.group_id = g.id)
    WHEN g.num_with_reward < :min_verdicts THEN 'unscored'
    WHEN EXISTS (SELECT 1 FROM log.choice h WHERE h.group_id = g.id) THEN 'chosen'
    WHEN EXISTS (SELECT 1 FROM log.consumption c WHERE c.group_id = g.id) THEN 'consumed'
    WHEN NOT g.has_signal AND :skip_no_signal = 'all' THEN 'skipped'
    WHEN NOT EXISTS (SELECT 1 FROM log.set_aside a WHERE a.group_id = g.id) THEN 'waiting'
    WHEN NOT g.has_signal AND :skip_no_signal = 'stale' THEN 'skipped'
    ELSE 'late'
END"""
_TRAINED = """(SELECT json_group_array(json_array(step, kind)) FROM
    (SELECT c.step, c.kind FROM log.consumption c WHERE c.group_id = g.id ORDER BY c.step))"""
_PLAIN = (
    "id", "key", "epoch", "prompt_index", "worker", "lease_version", "oldest_version", "newest_version",
    "num_trajectories", "num_tokens", "num_sampled_tokens", "has_signal", "reward_mean", "reward_spread", "num_bytes",
    "appended_s", "evicted_s",
)  # fmt: skip
_OUTCOMES = tuple(f"num_{outcome.value}" for outcome in Outcome)
_INFO = f"SELECT {', '.join(f'g.{name}' for name in (*_PLAIN, *_OUTCOMES))}, {_STATE}, {_TRAINED} FROM groups g"


@dataclass(frozen=True, kw_only=True)
class GroupInfo:
    """A stored group without its payload: its row, and what became of it."""

    id: int
    key: str
    epoch: int
    prompt_index: int
    worker: str
    lease_version: int
    oldest_version: int
    newest_version: int
    num_trajectories: int
    num_tokens: int
    """Prompt and response tokens of all members."""
    num_sampled_tokens: int
    has_signal: bool
    reward_mean: float | None
    """None where no member has a verdict."""
    reward_spread: float
    """Mean |reward - group mean| over the verdicts."""
    num_bytes: int
    """Bytes of the payload, also of an evicted one."""
    appended_s: float
    """Unix time (seconds)."""
    evicted_s: float | None
    """Unix time (seconds) at which the payload was dropped; None while it is held."""
    outcomes: dict[str, int]
    """Members by outcome, all outcomes."""
    state: str
    """One of ``STATES``."""
    trained: tuple[tuple[int, str], ...]
    """Step and kind of every learner step that trained on it, in order."""


@dataclass(frozen=True, kw_only=True)
class GroupFilter:
    """Which groups are meant; what is None does not matter."""

    versions: tuple[int, int] | None = None
    """Groups with tokens of these versions, both ends included."""
    step: int | None = None
    """Groups that this committed step trained on."""
    state: str | None = None
    """Groups in this one of ``STATES``."""

    def sql(self) -> tuple[str, dict[str, Any]]:
        """The condition on ``groups g``, and its values."""
        conditions, values = ["1"], dict[str, Any]()
        if self.versions is not None:
            conditions.append("g.oldest_version <= :newest AND g.newest_version >= :oldest")
            values |= {"oldest": self.versions[0], "newest": self.versions[1]}
        if self.step is not None:
            conditions.append("g.id IN (SELECT group_id FROM log.consumption WHERE step = :step)")
            values["step"] = self.step
        if self.state is not None:
            conditions.append(f"{_STATE} = :state")
            values["state"] = self.state
        return " AND ".join(conditions), values


@dataclass(frozen=True, kw_only=True)
class StateCounts:
    """Sums over the groups of one state."""

    state: str
    groups: int
    trajectories: int
    sampled_tokens: int
    bytes: int
    """Payload bytes: held ones, or for ``evicted`` those that were freed."""
    no_signal: int
    """Groups of enough verdicts, which are all equal."""
    unscored: int
    """Groups of too few verdicts to be trained on."""
    oldest_version: int
    newest_version: int
    outcomes: tuple[int, ...]
    """Trajectories in the order of ``Outcome``."""


class ShardView:
    """Read-only; to be used by one thread. ``ReplayError`` with the file and SQLite's words if it cannot be read."""

    def __init__(
        self, path: Path, log: Path, *, shard: int, shards: int, skip_no_signal: str, min_verdicts: int
    ) -> None:
        """``skip_no_signal``: which groups with equal rewards are ``skipped``, see ``ReplayConfig.no_signal_rule``;
        those of fewer than ``min_verdicts`` are ``unscored``."""
        self.path = path
        self._about = {
            "shard": shard,
            "shards": shards,
            "skip_no_signal": skip_no_signal,
            "min_verdicts": min_verdicts,
        }
        self._opened = ExitStack()
        self._db = self._opened.enter_context(reading(path))
        try:
            with clear_errors(path):
                self._db.execute("ATTACH ? AS log", (_uri(log),))
        except ReplayError:
            self._opened.close()
            raise

    def close(self) -> None:
        """May be called twice."""
        self._opened.close()

    def counts(self) -> list[StateCounts]:
        """Everything ever stored, by state."""
        outcomes = ", ".join(f"SUM(g.{name})" for name in _OUTCOMES)
        found = self._rows(
            f"SELECT {_STATE} AS state, COUNT(*), SUM(g.num_trajectories), SUM(g.num_sampled_tokens), "
            "SUM(g.num_bytes), SUM(g.num_with_reward >= :min_verdicts AND NOT g.has_signal), "
            "SUM(g.num_with_reward < :min_verdicts), "
            f"MIN(g.oldest_version), MAX(g.newest_version), {outcomes} FROM groups g GROUP BY state"
        )
        return [
            StateCounts(
                state=state,
                groups=groups,
                trajectories=trajectories,
                sampled_tokens=tokens,
                bytes=num_bytes,
                no_signal=no_signal,
                unscored=unscored,
                oldest_version=oldest,
                newest_version=newest,
                outcomes=tuple(of),
            )
            for state, groups, trajectories, tokens, num_bytes, no_signal, unscored, oldest, newest, *of in found
        ]

    def lags(self) -> list[tuple[str, int, int]]:
        """Kind, lag (of the group's oldest token when it was trained) and how often that was."""
        return self._rows(
            "SELECT c.kind, c.step - g.oldest_version AS lag, COUNT(*) FROM log.consumption c "
            "JOIN groups g ON g.id = c.group_id WHERE (c.group_id - 1) % :shards = :shard GROUP BY c.kind, lag",
        )

    def uses(self) -> list[tuple[int, int]]:
        """Number of uses (1 or more), and how many groups have had as many."""
        return self._rows(
            "SELECT uses, COUNT(*) FROM (SELECT COUNT(*) AS uses FROM log.consumption c "
            "WHERE (c.group_id - 1) % :shards = :shard GROUP BY c.group_id) GROUP BY uses",
        )

    def rewards(self) -> list[tuple[int, int, int, float]]:
        """By oldest version: the version, groups, verdicts, and the sum of their rewards."""
        return self._rows(
            "SELECT g.oldest_version, COUNT(*), SUM(g.num_with_reward), "
            "SUM(COALESCE(g.reward_mean, 0.0) * g.num_with_reward) FROM groups g GROUP BY g.oldest_version"
        )

    def count(self, which: GroupFilter) -> int:
        """Groups that ``which`` names."""
        condition, values = which.sql()
        return self._rows(f"SELECT COUNT(*) FROM groups g WHERE {condition}", values)[0][0]

    def newest(self, which: GroupFilter, limit: int) -> list[GroupInfo]:
        """At most ``limit`` of the groups that ``which`` names, the last to arrive first."""
        condition, values = which.sql()
        return self._infos(f"WHERE {condition} ORDER BY g.id DESC LIMIT :limit", {**values, "limit": limit})

    def page(self, *, after_id: int, up_to_id: int, limit: int) -> list[GroupInfo]:
        """At most ``limit`` groups with ``after_id`` < id <= ``up_to_id``, by id."""
        return self._infos(
            "WHERE g.id > :after AND g.id <= :end ORDER BY g.id LIMIT :limit",
            {"after": after_id, "end": up_to_id, "limit": limit},
        )

    def last_id(self) -> int:
        """The largest id; 0 in an empty shard."""
        return self._rows("SELECT COALESCE(MAX(id), 0) FROM groups")[0][0]

    def by_id(self, group_id: int) -> GroupInfo | None:
        """One group, if it is there."""
        return next(iter(self._infos("WHERE g.id = :id", {"id": group_id})), None)

    def by_key(self, key: str) -> GroupInfo | None:
        """One group, if it is there."""
        return next(iter(self._infos("WHERE g.key = :key", {"key": key})), None)

    def prompts(self) -> np.ndarray:
        """Epoch and prompt index of every group: a structured array of two int64 fields, 16 bytes per group."""
        with clear_errors(self.path):
            return np.fromiter(self._db.execute("SELECT epoch, prompt_index FROM groups"), dtype=PROMPT)

    def contradictions(self, *, max_lag: int | None, max_replay_lag: int | None) -> Iterator[str]:
        """One sentence for everything the log says that this shard's groups do not bear out.

        Args:
            max_lag: the bound (learner steps) on what was trained as fresh; None checks none.
            max_replay_lag: the same for stale.
        """
        name = self.path.name
        for table, what in (("consumption", "trained on"), ("choice", "has chosen")):
            for step, group_id in self._rows(
                f"SELECT step, group_id FROM log.{table} c WHERE (group_id - 1) % :shards = :shard "
                "AND NOT EXISTS (SELECT 1 FROM groups g WHERE g.id = c.group_id) ORDER BY step, group_id",
            ):
                yield f"step {step} {what} group {group_id}, which {name} does not hold"
        for group_id, reason in self._rows(
            "SELECT group_id, reason FROM log.set_aside a WHERE (group_id - 1) % :shards = :shard "
            "AND NOT EXISTS (SELECT 1 FROM groups g WHERE g.id = a.group_id) ORDER BY group_id",
        ):
            yield f"group {group_id} is set aside as {reason}, but {name} does not hold it"
        for step, group_id, key in self._rows(
            "SELECT h.step, g.id, g.key FROM log.choice h JOIN groups g ON g.id = h.group_id "
            "WHERE g.evicted_s IS NOT NULL ORDER BY g.id"
        ):
            yield f"step {step} has chosen group {group_id} ({key}), whose payload is evicted"
        yield from self._lag_violations({Kind.FRESH: max_lag, Kind.STALE: max_replay_lag})

    def _lag_violations(self, bounds: Mapping[Kind, int | None]) -> Iterator[str]:
        named = {Kind.FRESH: "replay.max_lag", Kind.STALE: "replay.max_replay_lag"}
        for kind, bound in bounds.items():
            for step, group_id, key, oldest, newest in self._rows(
                "SELECT c.step, g.id, g.key, g.oldest_version, g.newest_version FROM log.consumption c "
                "JOIN groups g ON g.id = c.group_id WHERE c.kind = :kind "
                "AND (g.newest_version > c.step OR c.step - g.oldest_version > COALESCE(:bound, c.step)) "
                "ORDER BY c.step, g.id",
                {"kind": kind.value, "bound": bound},
            ):
                trained = (
                    f"step {step} trained on {kind.value} group {group_id} ({key}) of versions {oldest} to {newest}"
                )
                if newest > step:
                    yield f"{trained}: version {newest} did not exist yet"
                else:
                    yield f"{trained}: lag {step - oldest} is above {named[kind]}={bound}"

    def _infos(self, rest: str, values: Mapping[str, Any]) -> list[GroupInfo]:
        return [_info(row) for row in self._rows(f"{_INFO} {rest}", values)]

    def _rows(self, sql: str, values: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
        """``values`` beside those of the shard: ``:shard``, ``:shards``, ``:skip_no_signal``, ``:min_verdicts``."""
        with clear_errors(self.path):
            self._db.execute("BEGIN")
            try:
                self._db.execute("SELECT 1 FROM log.steps LIMIT 1").fetchall()  # the log's snapshot first
                return self._db.execute(sql, {**self._about, **values}).fetchall()
            finally:
                self._db.execute("COMMIT")


def _info(row: Sequence[Any]) -> GroupInfo:
    plain = dict(zip(_PLAIN, row, strict=False))
    *counts, state, trained = row[len(_PLAIN) :]
    return GroupInfo(
        **{**plain, "has_signal": bool(plain["has_signal"])},
        outcomes={outcome.value: count for outcome, count in zip(Outcome, counts, strict=True)},
        state=state,
        trained=tuple((step, kind) for step, kind in json.loads(trained)),
    )


def _uri(path: Path) -> str:
    # Closed, and on a disk that nobody can write: SQLite could not make the log it asks for, and needs none.
    frozen = not log_of(path).exists() and not os.access(path.parent, os.W_OK)
    return path.absolute().as_uri() + ("?mode=ro&immutable=1" if frozen else "?mode=ro")
