"""Any sequence of what can happen to a store, against a model of a few lines."""

import asyncio
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from r2vpo.records import Kind
from replay.audit import audit_store
from replay.audit_rules import StepSettings
from replay.config import ReplayConfig
from replay.local import LocalStore
from replay.reader import StoreReader
from tests.replay.replay_groups import make_group, same, unscored_group

NUM_FRESH, NUM_STALE, MAX_REPLAY_LAG, CAPACITY = 2, 2, 3, 12


class StoreMachine(RuleBasedStateMachine):
    """``max_lag`` is so large that no group is ever late; `test_replay_service` looks at those that are."""

    def __init__(self):
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.groups = {}  # the model: groups by key, in order of arrival,
        self.ids = {}  # key of each id that a batch showed,
        self.dead = set()  # keys that a rewind made unusable,
        self.steps = []  # the batch of every committed step: [(key, kind)],
        self.choice = []  # the batch that was handed out and not committed,
        self.pinned = 0  # and the step before which the run is never resumed

    @initialize(shards=st.sampled_from([1, 1, 3]), capacity=st.sampled_from([None, CAPACITY]))
    def begin(self, shards, capacity):
        self.config = ReplayConfig(
            max_lag=1000,
            max_replay_lag=MAX_REPLAY_LAG,
            stale_fraction=NUM_STALE / (NUM_FRESH + NUM_STALE),
            shards=shards,
            capacity_groups=capacity,
        )
        self.open()

    def open(self, resume_step=None):
        self.store = LocalStore(
            self.directory,
            config=self.config,
            resume_step=resume_step,
            num_prompts=1000,
            groups_per_step=NUM_FRESH + NUM_STALE,
            steps=1000,
            seed=1,
        )
        self.run(self.store.open())
        self.run(self.store.service.keep_from(step=self.pinned))

    def run(self, awaitable):
        result = self.runner.run(awaitable)
        self.runner.run(self.settle())
        return result

    async def settle(self):
        """Let a sweep that has begun come to its end."""
        await asyncio.gather(*(task for task in asyncio.all_tasks() if task is not asyncio.current_task()))

    def teardown(self):
        self.run(self.store.close())
        self.runner.close()
        shutil.rmtree(self.directory)

    def consumed(self, since=0):
        return {key for batch in self.steps[since:] for key, _ in batch}

    def waiting(self):
        unusable = self.dead | self.consumed() | {key for key, _ in self.choice}
        return {key for key, g in self.groups.items() if g.num_scored >= 2 and key not in unusable}

    def needed(self):
        return self.waiting() | self.consumed(self.pinned) | {key for key, _ in self.choice}

    def eligible(self):
        oldest = len(self.steps) - MAX_REPLAY_LAG
        return {k for k in self.consumed() if self.groups[k].has_signal and self.groups[k].oldest_version >= oldest}

    @rule(data=st.data())
    def append(self, data):
        batch = []
        for _ in range(data.draw(st.integers(1, 4))):
            oldest = data.draw(st.integers(max(0, len(self.steps) - 2), len(self.steps)))
            make = data.draw(st.sampled_from([make_group, make_group, unscored_group]))
            batch.append(make(data.draw(st.integers(0, 40)), version=oldest))
        expected = []
        for group in batch:
            expected.append(group.key not in self.groups)
            self.groups.setdefault(group.key, group)
        assert self.run(self.together(batch)) == expected

    async def together(self, groups):
        return list(await asyncio.gather(*(self.store.append(group) for group in groups)))

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def retry(self, data):
        again = self.groups[data.draw(st.sampled_from(sorted(self.groups)))]
        assert self.run(self.together([again, again])) == [False, False]

    @rule()
    def sample(self):
        waiting, eligible = self.waiting(), self.eligible()
        batch = self.run(self.store.sample(step=len(self.steps), timeout_s=0.0))
        if batch is None:
            assert not self.choice
            assert len(waiting) < NUM_FRESH
            return
        chosen = [(g.group.key, g.kind) for g in batch.groups]
        self.ids |= {g.group.key: g.group_id for g in batch.groups}
        if self.choice:
            assert chosen == self.choice
            return
        fresh = [key for key, kind in chosen if kind is Kind.FRESH]
        stale = [key for key, kind in chosen if kind is Kind.STALE]
        assert len(set(fresh)) == NUM_FRESH
        assert set(fresh) <= waiting
        newest = max(self.groups[key].oldest_version for key in fresh)
        assert all(self.groups[key].oldest_version >= newest for key in waiting - set(fresh))
        assert set(stale) <= eligible
        assert len(set(stale)) == len(stale)
        if self.config.capacity_groups is None:
            assert len(stale) == min(NUM_STALE, len(eligible))
        for sampled in batch.groups:
            assert same(sampled.group, self.groups[sampled.group.key])
            assert sampled.uses == sum(sampled.group.key == key for batch in self.steps for key, _ in batch)
        self.choice = chosen

    @precondition(lambda self: self.choice)
    @rule()
    def commit(self):
        ids = tuple(self.ids[key] for key, _ in self.choice)
        self.run(self.store.commit(step=len(self.steps), group_ids=ids))
        self.steps.append(self.choice)
        self.choice = []

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def commit_again(self, data):
        step = data.draw(st.integers(0, len(self.steps) - 1))
        self.run(self.store.commit(step=step, group_ids=tuple(self.ids[key] for key, _ in self.steps[step])))

    @rule()
    def checkpoint(self):
        """Older steps are not needed any more: with a capacity, their payloads may go."""
        self.pinned = len(self.steps)
        self.run(self.store.service.keep_from(step=self.pinned))

    @rule(data=st.data())
    def rewind(self, data):
        self.run(self.store.close())
        self.go_on(data.draw(st.integers(self.pinned, len(self.steps))))

    @rule(data=st.data())
    def crash(self, data):
        """What the files hold at this moment is what a new process finds."""
        with tempfile.TemporaryDirectory() as aside:
            shutil.copytree(self.directory, aside, dirs_exist_ok=True)
            self.run(self.store.close())
            shutil.rmtree(self.directory)
            shutil.copytree(aside, self.directory)
        self.go_on(data.draw(st.integers(self.pinned, len(self.steps))))

    def go_on(self, step):
        del self.steps[step:]
        self.choice = []
        self.dead |= {key for key, group in self.groups.items() if group.newest_version > step}
        self.open(resume_step=step)

    @precondition(lambda self: self.config.shards > 1)
    @rule(shard=st.integers(0, 2))
    def a_shard_goes_and_comes_back(self, shard):
        self.run(self.store.detach(shard))
        self.run(self.store.attach(shard))

    @invariant()
    def the_store_says_what_the_model_says(self):
        stats = self.run(self.store.stats())
        assert stats["version"] == len(self.steps)
        assert stats["groups"] == len(self.groups)
        assert stats["fresh_waiting"] == len(self.waiting())
        if self.config.capacity_groups is None:
            assert (stats["stale_eligible"], stats["held_groups"]) == (len(self.eligible()), len(self.groups))
        else:
            assert stats["stale_eligible"] <= len(self.eligible())

    @invariant()
    def the_files_hold_what_the_model_holds(self):
        with StoreReader(self.directory) as reader:
            assert list(reader.verify()) == []
            for key in self.needed():
                assert same(reader.group(key).group, self.groups[key])
            for step, batch in enumerate(self.steps[self.pinned :], start=self.pinned):
                assert [(g.group.key, g.kind) for g in reader.batch(step).groups] == batch
        audit = audit_store(
            self.directory,
            settings=[
                StepSettings(
                    first_step=0,
                    max_lag=1000,
                    max_replay_lag=MAX_REPLAY_LAG,
                    min_verdicts=2,
                    groups_per_step=NUM_FRESH + NUM_STALE,
                    num_fresh=NUM_FRESH,
                    max_outstanding=0,
                    may_evict=self.config.capacity_groups is not None,
                )
            ],
            resume_step=lambda: self.pinned,
            acknowledged=self.groups,
        )
        assert audit.violations == ()
        assert (audit.version, audit.num_groups) == (len(self.steps), len(self.groups))


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
