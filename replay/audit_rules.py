"""What must hold of a store's tables, whatever happened to the run: one function per rule, each a pure look at arrays.

    StoreTables + StepSettings ──▶ Ledger ──rule──▶ sentences that name groups, keys and steps

Nothing here asks the code that wrote the tables: what it promises is worked out anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from r2vpo.records import prompt_key
from replay.audit_tables import GROUP, StoreTables
from replay.rows import shard_of_id, shard_of_key

REASONS = ("late", "ahead", "damaged")
"""Why a group may be set aside."""
_NAMED = 8
"""Most steps, keys or ids that one sentence names."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """What binds the learner steps from ``first_step`` on: the settings of one start of the run."""

    first_step: int
    started_s: float = 0.0
    """When that start was (Unix seconds): what was committed before it, an earlier start has trained."""
    max_lag: int
    max_replay_lag: int
    min_verdicts: int
    groups_per_step: int
    num_fresh: int | None
    """Fresh groups of every batch; None where their number is not fixed (`window`)."""
    max_outstanding: int
    """Most prompts that may be in flight or wait at once."""
    may_evict: bool
    """Whether any setting lets payloads be dropped."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order in which prompts are handed out: epoch after epoch a permutation, drawn from the seed."""

    seed: int
    num_prompts: int

    def of_epoch(self, epoch: int) -> np.ndarray:
        """int64 ``[num_prompts]``: the prompts of an epoch in their order."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_prompts)


class Ledger:
    """The tables of all shards that could be read, joined: what the rules look at."""

    def __init__(
        self, tables: StoreTables, *, settings: Sequence[StepSettings], order: Order | None, resume_step: int
    ) -> None:
        """``settings`` in the order of time. A resume may go back to ``resume_step``, never before it."""
        self.tables, self.settings, self.order, self.resume_step = tables, settings, order, resume_step
        self.shards = tables.log.shards
        self.version = tables.log.version
        groups = [shard.groups for shard in tables.shards.values()]
        joined = np.concatenate([np.zeros(0, GROUP), *groups])
        by_id = np.argsort(joined["id"], kind="stable")
        keys = [key for shard in tables.shards.values() for key in shard.keys]
        self.groups = joined[by_id]
        """``GROUP [n]``, ascending ids."""
        self.keys: list[str] = [keys[i] for i in by_id.tolist()]
        """The key of each."""

    @cached_property
    def uses(self) -> np.ndarray:
        """``USE [n]``: consumption, each pair of step and group once, by group and step."""
        uses = self.tables.log.consumption
        uses = uses[np.lexsort((uses["step"], uses["group_id"]))]
        return uses[~_repeated(uses["step"], uses["group_id"])]

    @cached_property
    def earlier_uses(self) -> np.ndarray:
        """int64 ``[uses]``: how many earlier steps trained on the group."""
        first = np.searchsorted(self.uses["group_id"], self.uses["group_id"])
        return np.arange(len(self.uses)) - first

    def is_here(self, group_ids: np.ndarray) -> np.ndarray:
        """bool ``[n]``: whether the shard that should hold the group could be read."""
        return np.isin((group_ids - 1) % self.shards, list(self.tables.shards))

    def find(self, group_ids: np.ndarray) -> np.ndarray:
        """int64 ``[n]``: positions of ids in ``groups``, -1 where there is none."""
        at = np.searchsorted(self.groups["id"], group_ids)
        found = at < len(self.groups)
        found[found] = self.groups["id"][at[found]] == group_ids[found]
        return np.where(found, at, -1)

    def setting(self, read: Callable[[StepSettings], int | None], steps: np.ndarray) -> np.ndarray:
        """float64 ``[n]``: what ``read`` says of the settings of each step, NaN where nothing is known."""
        log = self.tables.log
        values = np.full(len(log.steps), np.nan)
        for start in self.settings:
            value = read(start)
            bound = (log.steps >= start.first_step) & (log.committed_s >= start.started_s)
            values[bound] = np.nan if value is None else value
        at = np.searchsorted(log.steps, steps)
        known = at < len(log.steps)
        known[known] = log.steps[at[known]] == steps[known]
        return np.where(known, np.append(values, np.nan)[np.where(known, at, -1)], np.nan)

    def name(self, group_id: int) -> str:
        """``group 17 (0.16)``."""
        at = int(self.find(np.array([group_id]))[0])
        return f"group {group_id} ({self.keys[at]})" if at >= 0 else f"group {group_id}"

    def trained(self) -> tuple[np.ndarray, np.ndarray]:
        """The uses whose groups are here, ``USE [n]``, and the groups beside them, ``GROUP [n]``."""
        at = self.find(self.uses["group_id"])
        return self.uses[at >= 0], self.groups[at[at >= 0]]


def keys_are_unique(ledger: Ledger) -> Iterator[str]:
    """No prompt's key has two groups, over all shards."""
    ids: dict[str, list[int]] = {}
    if len(set(ledger.keys)) == len(ledger.keys):
        return
    for key, group_id in zip(ledger.keys, ledger.groups["id"].tolist(), strict=True):
        ids.setdefault(key, []).append(group_id)
    for key, of in ids.items():
        if len(of) > 1:
            yield f"key {key} has {len(of)} groups: {_few(of)}"


def groups_lie_in_their_shard(ledger: Ledger) -> Iterator[str]:
    """A group's id and key both name the shard that holds it; the columns beside a key are those of the key."""
    for number, shard in ledger.tables.shards.items():
        if shard.place != (number, ledger.shards):
            yield f"{shard.path.name} says that it is shard {shard.place[0]} of {shard.place[1]}"
        for key, row in zip(shard.keys, shard.groups, strict=True):
            group_id = int(row["id"])
            if shard_of_id(group_id, ledger.shards) != number:
                yield f"{shard.path.name} holds group {group_id} ({key}), whose id is not one of this shard"
            if key != prompt_key(int(row["epoch"]), int(row["prompt_index"])):
                yield f"group {group_id} ({key}) says that it answers prompt {row['epoch']}.{row['prompt_index']}"
            elif ledger.shards > 1 and shard_of_key(key, ledger.shards) != number:
                yield f"{shard.path.name} holds group {group_id} ({key}), whose key is not one of this shard"


def steps_are_contiguous(ledger: Ledger) -> Iterator[str]:
    """Committed steps are 0, 1, 2, …, each once and with groups; nothing was consumed by any other."""
    steps = ledger.tables.log.steps
    missing = np.setdiff1d(np.arange(ledger.version), steps)
    if len(missing):
        yield f"step {_few(missing.tolist())} is not committed, but step {ledger.version - 1} is"
    if len(np.unique(steps)) < len(steps) or steps.min(initial=0) < 0:
        yield f"the log's steps are not 0, 1, 2, …: {_few(steps.tolist())}"
    with_groups = np.unique(ledger.tables.log.consumption["step"])
    for step in np.setdiff1d(steps, with_groups).tolist():
        yield f"step {step} is committed without any group"
    for step in np.setdiff1d(with_groups, steps).tolist():
        yield f"step {step} consumed groups, but is not committed"


def no_group_twice_in_a_step(ledger: Ledger) -> Iterator[str]:
    """A step consumes a group once; so does the batch in work."""
    for table in (ledger.tables.log.consumption, ledger.tables.log.choice):
        by_pair = table[np.lexsort((table["step"], table["group_id"]))]
        for use in by_pair[_repeated(by_pair["step"], by_pair["group_id"])]:
            yield f"step {use['step']} trained on {ledger.name(int(use['group_id']))} more than once"


def fresh_once(ledger: Ledger) -> Iterator[str]:
    """A group is trained as fresh once at most, and only by the first step that trains on it."""
    again = ledger.uses["is_fresh"] & (ledger.earlier_uses > 0)
    for i in np.flatnonzero(again).tolist():
        step, group_id = int(ledger.uses["step"][i]), int(ledger.uses["group_id"][i])
        before = ledger.uses["step"][i - int(ledger.earlier_uses[i])]
        yield f"step {step} trained on {ledger.name(group_id)} as fresh, but step {before} had trained on it"


def uses_are_counted(ledger: Ledger) -> Iterator[str]:
    """What a step notes of a group's earlier uses is the number of earlier steps that trained on it."""
    for i in np.flatnonzero(ledger.uses["uses"] != ledger.earlier_uses).tolist():
        use = ledger.uses[i]
        yield (
            f"step {use['step']} notes {use['uses']} earlier uses of {ledger.name(int(use['group_id']))}, "
            f"but {ledger.earlier_uses[i]} earlier steps trained on it"
        )


def batches_are_whole(ledger: Ledger) -> Iterator[str]:
    """Positions count from 0, weights are positive, and there are as many (fresh) groups as the settings say."""
    uses, steps = ledger.uses, np.unique(ledger.uses["step"])
    size = np.bincount(uses["step"], minlength=1)[steps]
    fresh = np.bincount(uses["step"], weights=uses["is_fresh"], minlength=1)[steps].astype(np.int64)
    most = ledger.setting(lambda s: s.groups_per_step, steps)
    wanted = ledger.setting(lambda s: s.num_fresh, steps)
    for i in np.flatnonzero(size > most).tolist():
        yield f"step {steps[i]} trained on {size[i]} groups, more than learner.groups_per_step={most[i]:.0f}"
    for i in np.flatnonzero(~np.isnan(wanted) & (fresh != wanted)).tolist():
        yield f"step {steps[i]} trained on {fresh[i]} fresh groups, its settings ask for {wanted[i]:.0f}"
    placed = uses[np.lexsort((uses["position"], uses["step"]))]
    wrong = placed["position"] != np.arange(len(placed)) - np.searchsorted(placed["step"], placed["step"])
    for step in np.unique(placed["step"][wrong]).tolist():
        yield f"the groups of step {step} are not at positions 0, 1, 2, …"
    for use in uses[~(np.isfinite(uses["weight"]) & (uses["weight"] > 0))]:
        yield f"step {use['step']} gave {ledger.name(int(use['group_id']))} the weight {use['weight']}"


def lags_are_bounded(ledger: Ledger) -> Iterator[str]:
    """Lags keep the bound of their kind that was in force at their step."""
    uses, groups = ledger.trained()
    lags = uses["step"] - groups["oldest_version"]
    kinds = (
        ("fresh", "replay.max_lag", uses["is_fresh"], ledger.setting(lambda s: s.max_lag, uses["step"])),
        ("stale", "replay.max_replay_lag", ~uses["is_fresh"], ledger.setting(lambda s: s.max_replay_lag, uses["step"])),
    )
    for kind, key, of_kind, bound in kinds:
        for i in np.flatnonzero(of_kind & (lags > bound)).tolist():
            yield (
                f"step {uses['step'][i]} trained on {kind} {ledger.name(int(groups['id'][i]))} of version "
                f"{groups['oldest_version'][i]}: lag {lags[i]} is above {key}={bound[i]:.0f}"
            )


def nothing_from_the_future(ledger: Ledger) -> Iterator[str]:
    """No token is newer than the step that trains on it, or than the learner is now, unless it is set aside."""
    uses, groups = ledger.trained()
    for i in np.flatnonzero(groups["newest_version"] > uses["step"]).tolist():
        yield (
            f"step {uses['step'][i]} trained on {ledger.name(int(groups['id'][i]))}, which holds a token of version "
            f"{groups['newest_version'][i]}: that did not exist yet"
        )


def verdicts_suffice(ledger: Ledger) -> Iterator[str]:
    """What was trained on had as many verdicts as ``replay.min_verdicts`` asked for at that step."""
    uses, groups = ledger.trained()
    least = ledger.setting(lambda s: s.min_verdicts, uses["step"])
    for i in np.flatnonzero(groups["num_with_reward"] < least).tolist():
        yield (
            f"step {uses['step'][i]} trained on {ledger.name(int(groups['id'][i]))} with "
            f"{groups['num_with_reward'][i]} verdicts, fewer than replay.min_verdicts={least[i]:.0f}"
        )


def trained_groups_are_there(ledger: Ledger) -> Iterator[str]:
    """A group that a step trained on is in its shard; its payload was dropped only where that is lawful."""
    ids, first = np.unique(ledger.uses["group_id"], return_index=True)
    last_step = ledger.uses["step"][np.append(first[1:], len(ledger.uses)) - 1] if len(ids) else ids
    at = ledger.find(ids)
    for i in np.flatnonzero((at < 0) & ledger.is_here(ids)).tolist():
        yield f"step {last_step[i]} trained on group {ids[i]}, which the store does not hold"
    evicted = ~np.isnan(ledger.groups["evicted_s"])
    gone = (at >= 0) & np.append(evicted, False)[at]
    for i in np.flatnonzero(gone & (last_step >= ledger.resume_step)).tolist():
        yield (
            f"{ledger.name(int(ids[i]))} is evicted, but step {last_step[i]} trained on it and a resume goes back to "
            f"step {ledger.resume_step}"
        )
    if ledger.settings and not any(start.may_evict for start in ledger.settings):
        for i in np.flatnonzero(evicted).tolist():
            yield f"{ledger.name(int(ledger.groups['id'][i]))} is evicted, although no setting asks for it"


def set_aside_is_not_trained(ledger: Ledger) -> Iterator[str]:
    """What is set aside is there, for a reason that is known; of undone versions, no step trained on it."""
    aside = ledger.tables.log.aside
    ids = np.fromiter(aside, dtype=np.int64)
    for i in ids[(ledger.find(ids) < 0) & ledger.is_here(ids)].tolist():
        yield f"group {i} is set aside as {aside[i]}, but the store does not hold it"
    for i, reason in aside.items():
        if reason not in REASONS:
            yield f"{ledger.name(i)} is set aside as {reason}, which is no reason"
    ahead = [i for i, reason in aside.items() if reason == "ahead"]
    for use in ledger.uses[np.isin(ledger.uses["group_id"], np.array(ahead, dtype=np.int64))]:
        yield f"step {use['step']} trained on {ledger.name(int(use['group_id']))}, which is set aside as ahead"


def the_choice_is_next(ledger: Ledger) -> Iterator[str]:
    """The batch in work is that of the next step, of groups that are held and within their bounds."""
    choice = ledger.tables.log.choice
    for step in np.unique(choice["step"][choice["step"] != ledger.version]).tolist():
        yield f"a batch is chosen for step {step}, but the next step is {ledger.version}"
    at = ledger.find(choice["group_id"])
    for group_id in choice["group_id"][(at < 0) & ledger.is_here(choice["group_id"])].tolist():
        yield f"group {group_id} is chosen for step {ledger.version}, but the store does not hold it"
    for group in ledger.groups[at[at >= 0]]:
        if not np.isnan(group["evicted_s"]):
            yield f"{ledger.name(int(group['id']))} is chosen for step {ledger.version}, but is evicted"
        if group["newest_version"] > ledger.version:
            yield f"{ledger.name(int(group['id']))} is chosen for step {ledger.version}, but of newer versions"


def no_prompt_is_skipped(ledger: Ledger) -> Iterator[str]:
    """Prompts are handed out in their order: those passed over are no more than may be in flight at once.

    A shard that is away has its prompts kept back, so each shard's part of the order counts for itself.
    """
    if ledger.order is None or not ledger.settings:
        return
    order, answered = ledger.order, set(ledger.keys)
    beyond = ledger.groups["prompt_index"] >= order.num_prompts
    for i in np.flatnonzero(beyond).tolist():
        yield f"{ledger.name(int(ledger.groups['id'][i]))} answers a prompt beyond the task's {order.num_prompts}"
    passed: list[str] = []
    open_of_shard: Mapping[int, list[str]] = {shard: [] for shard in ledger.tables.shards}
    for epoch in range(int(ledger.groups["epoch"].max(initial=-1)) + 1):
        for index in order.of_epoch(epoch).tolist():
            key = prompt_key(epoch, index)
            shard = shard_of_key(key, ledger.shards) if ledger.shards > 1 else 0
            if shard not in open_of_shard:
                continue
            if key not in answered:
                open_of_shard[shard].append(key)
            elif open_of_shard[shard]:
                passed += open_of_shard[shard]
                open_of_shard[shard].clear()
    # While a shard is away its leases do not count against the others, so that as many again may be out.
    most = max(start.max_outstanding for start in ledger.settings) * (2 if ledger.shards > 1 else 1)
    if len(passed) > most:
        yield (
            f"{len(passed)} prompts were passed over ({_few(passed)}): later ones of the order are answered, and at "
            f"most {most} may be in flight at once"
        )


def _repeated(*sorted_columns: np.ndarray) -> np.ndarray:
    """bool ``[n]``: rows that are equal to the one before."""
    repeated = np.zeros(len(sorted_columns[0]), dtype=np.bool_)
    repeated[1:] = np.all([np.diff(column) == 0 for column in sorted_columns], axis=0)
    return repeated


def _few(names: Sequence[object]) -> str:
    more = len(names) - _NAMED
    return ", ".join(map(str, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")
