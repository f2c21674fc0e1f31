"""A run's replay store for people and tools: read-only, beside the writers of a live run or after it has ended.

    RUN/replay/  consumption.sqlite3 ── StoreReader ──▶ stats, groups, batches, what is wrong with it
                 shard-000.sqlite3 …

A shard whose file lies on another host is ``missing``, one that cannot be opened is ``unreadable``; all else is
answered from the others.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from r2vpo.records import Kind, Outcome, SampledBatch, TrajectoryGroup
from replay.consumption import ConsumptionLog
from replay.database import log_of, remove_empty_log
from replay.errors import ReplayError
from replay.rows import by_shard, shard_of_id, shard_of_key
from replay.schema import CONSUMPTION_FILE, shard_file
from replay.serialize import decode
from replay.shard import ShardStore
from replay.shard_view import STATES, GroupFilter, GroupInfo, ShardView, StateCounts

UNUSABLE = ("unscored", "late", "ahead", "damaged")
"""Why a group is not drawn as fresh (``late``), or never."""
PAGE = 256
MOST_NAMED = 5
"""Most groups that one sentence names."""


@dataclass(frozen=True, kw_only=True)
class StoredGroup:
    """A group of the store: its row, what became of it, and its content where that can be read."""

    info: GroupInfo
    group: TrajectoryGroup | None
    problem: str = ""
    """Why ``group`` is None, in one sentence."""


@dataclass(frozen=True, kw_only=True)
class VersionReward:
    """What the weights of one version earned."""

    version: int
    """Oldest version of the groups."""
    groups: int
    verdicts: int
    """Trajectories with a reward."""
    reward: float | None
    """Mean over the verdicts."""


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """Counts over the shards that can be read; ``version``, ``trained`` and ``set_aside`` are of the whole run."""

    version: int
    """Number of the next learner step."""
    shards: int
    missing: dict[int, str]
    """Shards whose files are not here: number → host, empty where it is not known."""
    unreadable: dict[int, str]
    """Shards that cannot be opened: number → sentence."""
    groups: int
    trajectories: int
    sampled_tokens: int
    held_groups: int
    held_bytes: int
    evicted_groups: int
    evicted_bytes: int
    file_bytes: int
    """Of all files here, logs included."""
    oldest_version: int | None
    newest_version: int | None
    outcomes: dict[str, int]
    """Trajectories by outcome."""
    states: dict[str, int]
    """Groups by state; every group has one."""
    unusable: dict[str, int]
    """Groups by ``UNUSABLE`` reason; a group may count twice."""
    no_signal: int
    """Groups of enough verdicts to be trained on, which are all equal."""
    trained: dict[str, int]
    """Groups trained on, by kind, each use counted."""
    lags: dict[str, dict[int, int]]
    """By kind: lag (learner steps) of the oldest token when the group was trained → how often."""
    uses: dict[int, int]
    """Number of uses → groups."""
    rewards: tuple[VersionReward, ...]
    """By version, ascending."""


class StoreReader:
    """The store in ``directory`` (RUN/replay). To be used by one thread; a context manager.

    ``ReplayError`` if there is no store, its log cannot be read, or none of the shards that are here can.
    """

    def __init__(self, directory: Path, *, skip_no_signal: str = "none", min_verdicts: int = 2) -> None:
        """``skip_no_signal``: the run's rule (see ``ReplayConfig.no_signal_rule``), by which groups are ``skipped``;
        ``min_verdicts``: its setting, by which they are ``unscored``."""
        self.directory = directory
        self._skip_no_signal, self._min_verdicts = skip_no_signal, min_verdicts
        self.missing: dict[int, str] = {}
        """Shards whose files are not here: number → host, empty where it is not known."""
        self.unreadable: dict[int, str] = {}
        """Shards that cannot be opened: number → sentence."""
        self._stores: dict[int, ShardStore] = {}
        self._views: dict[int, ShardView] = {}
        log_path = directory / CONSUMPTION_FILE
        with ExitStack() as undo:
            undo.callback(self._remove_empty_logs)
            undo.callback(self._close_shards)
            if not log_path.is_file():
                raise self._no_log(log_path)
            self._log = ConsumptionLog(log_path, read_only=True)
            undo.callback(self._log.close)
            self.shards = self._log.shards
            hosts = self._log.hosts
            for shard in range(self.shards):
                if (directory / shard_file(shard)).is_file():
                    self._open_shard(shard)
                else:
                    self.missing[shard] = hosts.get(shard, "")
            if self.unreadable and not self._views:
                raise ReplayError("; ".join(self.unreadable.values()))
            undo.pop_all()

    @property
    def version(self) -> int:
        """Number of the next learner step."""
        return self._log.version

    @property
    def file_bytes(self) -> int:
        """Size of the files that are read, SQLite's logs included."""
        paths = [self.directory / CONSUMPTION_FILE, *(view.path for view in self._views.values())]
        return sum(file.stat().st_size for path in paths for file in (path, log_of(path)) if file.exists())

    @property
    def gaps(self) -> list[str]:
        """One sentence for each shard that is not read."""
        missing = [
            f"shard {shard} of {self.shards} is not here: {shard_file(shard)} lies on "
            + (f"host {host}" if host else "another host")
            for shard, host in self.missing.items()
        ]
        return [*missing, *self.unreadable.values()]

    def stats(self) -> StoreStats:
        """Counts, by aggregates over both files."""
        counts = [state for view in self._views.values() for state in view.counts()]
        evicted = [c for c in counts if c.state == "evicted"]
        held = [c for c in counts if c.state != "evicted"]
        log = self._log.stats()
        return StoreStats(
            version=self.version,
            shards=self.shards,
            missing=dict(self.missing),
            unreadable=dict(self.unreadable),
            groups=sum(c.groups for c in counts),
            trajectories=sum(c.trajectories for c in counts),
            sampled_tokens=sum(c.sampled_tokens for c in counts),
            held_groups=sum(c.groups for c in held),
            held_bytes=sum(c.bytes for c in held),
            evicted_groups=sum(c.groups for c in evicted),
            evicted_bytes=sum(c.bytes for c in evicted),
            file_bytes=self.file_bytes,
            oldest_version=min((c.oldest_version for c in counts), default=None),
            newest_version=max((c.newest_version for c in counts), default=None),
            outcomes={o.value: sum(c.outcomes[index] for c in counts) for index, o in enumerate(Outcome)},
            states={name: sum(c.groups for c in counts if c.state == name) for name in STATES},
            unusable={
                name: sum(c.unscored for c in counts) if name == "unscored" else log["aside"].get(name, 0)
                for name in UNUSABLE
            },
            no_signal=sum(c.no_signal for c in counts),
            trained={kind.value: log["uses"].get(kind.value, 0) for kind in Kind},
            lags=self._lags(),
            uses=self._uses(counts),
            rewards=self._rewards(),
        )

    def count(self, which: GroupFilter) -> int:
        """Groups that ``which`` names."""
        return sum(view.count(which) for view in self._views.values())

    def newest(self, which: GroupFilter, *, limit: int) -> list[GroupInfo]:
        """At most ``limit`` of the groups that ``which`` names, newest ids first."""
        found = [view.newest(which, limit) for view in self._views.values()]
        return list(islice(merge(*found, key=lambda info: info.id, reverse=True), limit))

    def group(self, which: int | str) -> StoredGroup:
        """One group by id or key. ``LookupError`` if the store has none, ``ValueError`` for a malformed key,
        ``ReplayError`` if its shard cannot be read."""
        if isinstance(which, int):
            view = self._view(shard_of_id(which, self.shards), f"group {which}") if which > 0 else None
            info = view and view.by_id(which)
        else:
            info = self._view(shard_of_key(which, self.shards), f"the group of prompt {which}").by_key(which)
        if info is None:
            what = f"group {which}" if isinstance(which, int) else f"group of prompt {which}"
            raise LookupError(f"{self.directory} has no {what}")
        return next(iter(self.read([info])))

    def groups(self) -> Iterator[StoredGroup]:
        """All groups that are there now, shard by shard in order of arrival, a page at a time."""
        for view in self._views.values():
            after, end = 0, view.last_id()
            while page := view.page(after_id=after, up_to_id=end, limit=PAGE):
                # In pieces: a payload may be megabytes, a row is not.
                for start in range(0, len(page), 16):
                    yield from self.read(page[start : start + 16])
                after = page[-1].id

    def read(self, infos: Sequence[GroupInfo]) -> list[StoredGroup]:
        """The contents of the groups of these rows, in their order."""
        contents, problems = self._contents([info.id for info in infos])
        return [
            StoredGroup(
                # What has no payload may have been evicted since its row was read.
                info=(self._views[shard_of_id(info.id, self.shards)].by_id(info.id) or info)
                if info.id in problems
                else info,
                group=contents.get(info.id),
                problem=problems.get(info.id, ""),
            )
            for info in infos
        ]

    def batch(self, step: int) -> SampledBatch:
        """The batch that a committed step trained on, as it was then.

        ``LookupError`` if the step is not committed, ``ReplayError`` naming groups that cannot be read, a few of many.
        """
        plan = self._log.plan(step)
        contents, problems = self._contents(plan.group_ids)
        if problems:
            raise ReplayError(f"the batch of step {step} is incomplete: {_few(list(problems.values()))}")
        return plan.batch(contents)

    def verify(
        self,
        *,
        max_lag: int | None = None,
        max_replay_lag: int | None = None,
        progress: Callable[[str], None] = lambda what: None,
    ) -> Iterator[str]:
        """Read everything, and yield one sentence per problem; shards on other hosts are left out.

        Args:
            max_lag: the bound (learner steps) that every group trained as fresh must have kept; None checks none.
            max_replay_lag: the same for stale.
            progress: told what is read next.
        """
        progress(f"reading {CONSUMPTION_FILE}")
        yield from self._log.verify()
        yield from self.unreadable.values()
        here = socket.gethostname()
        for shard, host in self.missing.items():
            if host == here:
                yield f"{self.directory / shard_file(shard)} is missing, and the log says that it lies on this host"
        for shard, view in self._views.items():
            size = view.path.stat().st_size
            progress(f"reading {view.path.name} ({size / 1e6:,.0f} MB), shard {shard + 1} of {self.shards}")
            try:
                yield from self._stores[shard].verify()
                yield from view.contradictions(max_lag=max_lag, max_replay_lag=max_replay_lag)
            except ReplayError as error:  # this file is too damaged to go on with; the others are not
                yield str(error)
        progress("comparing the shards")
        try:
            yield from self._answered_twice()
        except ReplayError as error:
            yield f"{error} (whether a prompt has groups in two shards was not looked at)"

    def close(self) -> None:
        """May be called twice."""
        self._close_shards()
        self._log.close()
        self._remove_empty_logs()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _no_log(self, log_path: Path) -> ReplayError:
        """Why there is nothing to read."""
        shard = self.directory / shard_file(0)
        if shard.is_file():
            with suppress(ValueError):  # one of several shards
                ShardStore(shard, read_only=True).close()  # a file of an earlier schema says so itself
            return ReplayError(f"{log_path} is missing, without which the shards beside it cannot be read")
        return ReplayError(f"{self.directory} holds no replay store")

    def _open_shard(self, shard: int) -> None:
        path = self.directory / shard_file(shard)
        try:
            self._stores[shard] = ShardStore(path, shard=shard, shards=self.shards, read_only=True)
            self._views[shard] = ShardView(
                path,
                self.directory / CONSUMPTION_FILE,
                shard=shard,
                shards=self.shards,
                skip_no_signal=self._skip_no_signal,
                min_verdicts=self._min_verdicts,
            )
        except ReplayError as error:
            self.unreadable[shard] = str(error)

    def _close_shards(self) -> None:
        for opened in (*self._views.values(), *self._stores.values()):
            opened.close()

    def _remove_empty_logs(self) -> None:
        """Leave no file behind that was not there before, if this was the last reader and there is no writer."""
        for path in (self.directory / CONSUMPTION_FILE, *self.directory.glob("shard-*.sqlite3")):
            remove_empty_log(path)

    def _view(self, shard: int, what: str) -> ShardView:
        if shard in self._views:
            return self._views[shard]
        raise ReplayError(f"{what} cannot be read: {self._gap(shard)}")

    def _gap(self, shard: int) -> str:
        if shard in self.unreadable:
            return self.unreadable[shard]
        host = self.missing[shard]
        return f"{shard_file(shard)} is not here, it lies on " + (f"host {host}" if host else "another host")

    def _contents(self, group_ids: Sequence[int]) -> tuple[dict[int, TrajectoryGroup], dict[int, str]]:
        """The groups that can be read, and a sentence for each other one."""
        contents: dict[int, TrajectoryGroup] = {}
        problems: dict[int, str] = {}
        for shard, ids in by_shard(group_ids, self.shards).items():
            if shard not in self._stores:
                problems |= {i: f"group {i} cannot be read: {self._gap(shard)}" for i in ids}
                continue
            payloads, wrong = self._stores[shard].read(ids)
            problems |= wrong
            for group_id, payload in zip(ids, payloads, strict=True):
                if payload is not None:
                    try:
                        contents[group_id] = decode(payload)
                    except (ValueError, LookupError) as error:
                        problems[group_id] = f"group {group_id} cannot be read: {error}"
        return contents, problems

    def _lags(self) -> dict[str, dict[int, int]]:
        lags: dict[str, dict[int, int]] = {kind.value: {} for kind in Kind}
        for view in self._views.values():
            for kind, lag, count in view.lags():
                lags[kind][lag] = lags[kind].get(lag, 0) + count
        return {kind: dict(sorted(of.items())) for kind, of in lags.items()}

    def _uses(self, counts: Sequence[StateCounts]) -> dict[int, int]:
        uses: dict[int, int] = {}
        for view in self._views.values():
            for number, groups in view.uses():
                uses[number] = uses.get(number, 0) + groups
        unused = sum(c.groups for c in counts) - sum(uses.values())
        return dict(sorted((uses | {0: unused}).items()))

    def _rewards(self) -> tuple[VersionReward, ...]:
        sums: dict[int, np.ndarray] = {}
        for view in self._views.values():
            for version, *row in view.rewards():
                sums[version] = sums.get(version, np.zeros(3)) + np.array(row, dtype=np.float64)
        return tuple(
            VersionReward(
                version=version,
                groups=int(groups),
                verdicts=int(verdicts),
                reward=float(total / verdicts) if verdicts else None,
            )
            for version, (groups, verdicts, total) in sorted(sums.items())
        )

    def _answered_twice(self) -> Iterator[str]:
        """Prompts with a group in more than one shard; within one, SQLite itself forbids it."""
        if len(self._views) < 2:
            return
        prompts = np.concatenate([view.prompts() for view in self._views.values()])
        prompts, times = np.unique(prompts, return_counts=True)
        for epoch, index in prompts[times > 1].tolist():
            yield f"prompt {epoch}.{index} has a group in more than one shard"


def _few(sentences: Sequence[str]) -> str:
    """``first; second; … and 7 more``."""
    more = len(sentences) - MOST_NAMED
    return "; ".join(sentences[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
