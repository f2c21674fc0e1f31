"""The store as the service sees it in memory: which groups wait, which may be drawn again, and what a step takes.

    arrived(rows) ──▶ waiting ──draw(step)──▶ BatchPlan ──committed──▶ pool ──draw(step)──▶ …
                        │ too late for max_lag                          ▲
                        └───────────────────────────────────────────────┘

All of it is derived from the files when the store opens, so that nothing can disagree with them, and it spans all
shards, so that a batch is drawn from the whole store and not from each shard apart. Draws depend on the seed, the step
and what is there; not on how it came to be there. No disk and no event loop here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from r2vpo.records import BatchPlan, Draw, Kind
from replay.config import ReplayConfig
from replay.dispatcher import AHEAD, DAMAGED, LATE, Dispatcher
from replay.errors import LagViolation
from replay.ledger import PromptLedger
from replay.limiter import LagLimiter
from replay.pool import Pool
from replay.rows import ROW, Rows, shard_of_id
from replay.sampling import fresh_candidates, make_policy, stale_candidates


class Index:
    """Begins empty, at step ``next_step``; `load` fills it."""

    def __init__(
        self,
        config: ReplayConfig,
        *,
        groups_per_step: int,
        steps: int,
        seed: int,
        next_step: int,
        ledger: PromptLedger,
    ) -> None:
        num_fresh = config.num_fresh(groups_per_step)
        self._config, self._seed, self._groups_per_step = config, seed, groups_per_step
        self._policy = make_policy(config)
        self._from_window = config.sample == "window"
        self.pool = Pool(self._policy, shards=config.shards)
        """Groups that may be drawn as stale ones."""
        self.dispatcher = Dispatcher(
            limiter=LagLimiter(max_lag=config.max_lag, num_fresh=num_fresh, steps=steps),
            ledger=ledger,
            waiting={},
            next_step=next_step,
            shards=config.shards,
        )
        self._rows: dict[int, Rows] = {}  # single rows of groups that wait, or were taken and are not committed

    def load(self, rows: Rows, *, uses: np.ndarray, aside: Mapping[int, str]) -> dict[int, str]:
        """Take in what the shards hold; ``uses`` beside each row, ``aside``: what was set aside before.

        Returns what is to be set aside from now on: id → reason.
        """
        step = self.dispatcher.next_step
        self.pool.expire(step - self._config.max_replay_lag)
        kept = ~_among(rows, aside, AHEAD, DAMAGED)
        ahead = kept & (rows["newest_version"] > step)
        reasons = {int(i): AHEAD for i in rows["id"][ahead]}
        kept &= ~ahead
        was_late = _among(rows, aside, LATE)
        fresh = kept & (uses == 0) & ~was_late & self._fresh_candidates(rows)
        order = np.flatnonzero(fresh)[np.lexsort((rows["id"][fresh], rows["oldest_version"][fresh]))]
        # All fit, unless the run goes on with a smaller max_lag or fewer fresh groups per step than it had.
        in_time = self.dispatcher.limiter.kept(rows["oldest_version"][order].tolist(), next_step=step)
        late = was_late & kept & (uses == 0)
        for i, fits in zip(order, in_time, strict=True):
            if fits:
                self._wait(rows[i])
            else:
                reasons[int(rows["id"][i])] = LATE
                late[i] = True
        self._add_to_pool(rows[kept & (uses > 0) | late], uses[kept & (uses > 0) | late])
        return reasons

    def arrived(self, rows: Rows) -> dict[int, str]:
        """Take in new groups, in order of arrival; returns those to be set aside: id → reason."""
        fresh = self._fresh_candidates(rows)
        reasons = self.dispatcher.unusable(rows, fresh.tolist())
        for row, is_fresh in zip(rows, fresh, strict=True):
            waits = bool(is_fresh) and int(row["id"]) not in reasons
            self.dispatcher.appended(row, waits=waits)
            if waits:
                self._rows[int(row["id"])] = row.copy()
        late = _among(rows, reasons, LATE)
        self._add_to_pool(rows[late], np.zeros(late.sum(), dtype=np.int64))
        return reasons

    def draw(self, step: int) -> BatchPlan:
        """The batch of ``step``, which must be the next one, or the one whose choice was undone."""
        fresh: list[int] = []
        if self.dispatcher.next_step == step:
            fresh = self.dispatcher.earliest_due()
            for i in fresh:
                self._check_lag(self._rows[i], step)
            self.dispatcher.taken(step, fresh)
            self.pool.expire(step - self._config.max_replay_lag)
            if self._from_window:
                self._add_to_pool(self._taken_rows(fresh), np.zeros(len(fresh), dtype=np.int64))
        rng = np.random.default_rng([self._seed, step])
        num_stale = self._groups_per_step if self._from_window else self._groups_per_step - len(fresh)
        drawn = self.pool.draw(num_stale, rng=rng, step=step, without=fresh if not self._from_window else ())
        draws = [] if self._from_window else [Draw(group_id=i, kind=Kind.FRESH) for i in fresh]
        draws += [
            Draw(group_id=i, kind=self._kind(i, uses, step), uses=uses, weight=weight) for i, uses, weight in drawn
        ]
        return BatchPlan(step=step, draws=tuple(sorted(draws, key=lambda d: d.kind is Kind.STALE)))

    def undo(self, plan: BatchPlan, damaged: Iterable[int]) -> None:
        """The choice of an uncommitted step is dropped, since groups in it are ``damaged``."""
        gone = set(damaged)
        self.pool.remove([i for i in gone if i in self.pool])
        fresh = [d.group_id for d in plan.draws if d.kind is Kind.FRESH and not self._from_window]
        for i in gone.intersection(self._rows):
            del self._rows[i]
        if fresh:
            back = {i: int(self._rows[i]["oldest_version"]) for i in fresh if i not in gone}
            self.dispatcher.untaken(plan.step, back)

    def committed(self, plan: BatchPlan) -> None:
        """The batch has been trained on: its groups may be drawn again."""
        ids = [d.group_id for d in plan.draws]
        if self._from_window:
            self.pool.used(ids)
        else:
            fresh = [d.group_id for d in plan.draws if d.kind is Kind.FRESH]
            self.pool.used([i for i in ids if i not in set(fresh)])
            self._add_to_pool(self._taken_rows(fresh), np.ones(len(fresh), dtype=np.int64))
        self.pool.expire(plan.step + 1 - self._config.max_replay_lag)
        for i in list(self._rows):
            if i not in self.dispatcher.waiting:
                del self._rows[i]

    def leave(self, shard: int) -> None:
        """A shard is away."""
        self.dispatcher.leave(shard)
        self.pool.drop_shard(shard)

    def return_(self, shard: int, rows: Rows, uses: np.ndarray, aside: Mapping[int, str]) -> dict[int, str]:
        """A shard is back; ``rows`` are those of its groups that are known. Returns what is to be set aside."""
        late = self.dispatcher.return_(shard)
        was_late = _among(rows, dict(aside) | dict.fromkeys(late, LATE), LATE)
        pooled = (uses > 0) | was_late
        if self._from_window:  # all that was taken is there, drawn or not
            pooled |= ~np.isin(rows["id"], np.fromiter(self.dispatcher.waiting, dtype=np.int64))
        stale = pooled & ~_among(rows, aside, AHEAD, DAMAGED)
        self._add_to_pool(rows[stale], uses[stale])
        for i in late:
            self._rows.pop(i, None)
        return dict.fromkeys(late, LATE)

    def shards_of(self, plan: BatchPlan) -> set[int]:
        """The shards that hold the groups of a plan."""
        return {shard_of_id(i, self._config.shards) for i in plan.group_ids}

    def _wait(self, row: Rows) -> None:
        group_id = int(row["id"])
        self.dispatcher.waiting[group_id] = int(row["oldest_version"])
        self._rows[group_id] = row.copy()

    def _taken_rows(self, group_ids: Sequence[int]) -> Rows:
        return np.array([self._rows[i] for i in group_ids], dtype=ROW)

    def _add_to_pool(self, rows: Rows, uses: np.ndarray) -> None:
        """Let groups be drawn, as far as they may be; those of a shard that is away come when it is back."""
        eligible = stale_candidates(rows, self._config.no_signal_rule, self._config.min_verdicts)
        eligible &= ~np.isin((rows["id"] - 1) % self._config.shards, list(self.dispatcher.away))
        self.pool.add(rows[eligible], uses[eligible])

    def _fresh_candidates(self, rows: Rows) -> np.ndarray:
        return fresh_candidates(rows, self._config.no_signal_rule, self._config.min_verdicts)

    def _kind(self, group_id: int, uses: int, step: int) -> Kind:
        """Only in a window may a pooled group be fresh: one never consumed, and still within ``max_lag``."""
        if self._from_window and uses == 0 and step - self.pool.version(group_id) <= self._config.max_lag:
            return Kind.FRESH
        return Kind.STALE

    def _check_lag(self, row: Rows, step: int) -> None:
        oldest, newest = int(row["oldest_version"]), int(row["newest_version"])
        if step - oldest > self._config.max_lag or newest > step:
            raise LagViolation(
                f"fresh group {int(row['id'])} holds versions {oldest} to {newest}; at step {step} its lag must lie "
                f"between 0 and replay.max_lag={self._config.max_lag}"
            )


def _among(rows: Rows, reasons: Mapping[int, str], *wanted: str) -> np.ndarray:
    """Which rows have one of the ``wanted`` reasons: bool ``[rows]``."""
    ids = [i for i, reason in reasons.items() if reason in wanted]
    return np.isin(rows["id"], np.array(ids, dtype=np.int64))
