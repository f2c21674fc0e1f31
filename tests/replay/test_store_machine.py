"""Any sequence of appends, retries, samples, commits, rewinds and reopenings, against a model of a few lines."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from r2vpo.records import Kind
from replay.store import ReplayStore
from tests.replay.replay_groups import make_group, same, unscored_group

NUM_FRESH, NUM_STALE, MAX_REPLAY_LAG = 2, 2, 3


class StoreMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.store = ReplayStore(self.directory / "store.sqlite3")
        self.groups = []  # the model: groups in order of arrival (id = position + 1),
        self.dead = set()  # ids that a rewind made unusable,
        self.steps = []  # the batch of every committed step: [(id, kind)],
        self.choice = []  # and the batch that was handed out and not committed

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.directory)

    def consumed(self):
        return {i for batch in self.steps for i, _ in batch}

    def waiting(self):
        ids = range(1, len(self.groups) + 1)
        usable = [i for i in ids if self.groups[i - 1].num_scored >= 2 and i not in self.dead | self.consumed()]
        return sorted(usable, key=lambda i: (self.groups[i - 1].oldest_version, i))

    def eligible(self):
        oldest = len(self.steps) - MAX_REPLAY_LAG
        return {
            i for i in self.consumed() if self.groups[i - 1].has_signal and self.groups[i - 1].oldest_version >= oldest
        }

    @rule(data=st.data())
    def append(self, data):
        batch = []
        for _ in range(data.draw(st.integers(1, 4))):
            oldest = data.draw(st.integers(max(0, len(self.steps) - 2), len(self.steps)))
            make = data.draw(st.sampled_from([make_group, make_group, unscored_group]))
            batch.append(make(data.draw(st.integers(0, 30)), version=oldest))
        keys = [g.key for g in self.groups]
        expected = []
        for group in batch:
            expected.append(group.key not in keys)
            if expected[-1]:
                keys.append(group.key)
                self.groups.append(group)
        assert self.store.append_many(batch) == expected

    @precondition(lambda self: self.groups)
    @rule(data=st.data())
    def retry(self, data):
        again = data.draw(st.sampled_from(self.groups))
        assert self.store.append_many([again, again]) == [False, False]

    @rule()
    def sample(self):
        batch = self.store.sample(
            step=len(self.steps),
            num_fresh=NUM_FRESH,
            num_stale=NUM_STALE,
            max_lag=100,
            max_replay_lag=MAX_REPLAY_LAG,
            seed=1,
        )
        if batch is None:
            assert not self.choice
            assert len(self.waiting()) < NUM_FRESH
            return
        chosen = [(g.group_id, g.kind) for g in batch.groups]
        if self.choice:
            assert chosen == self.choice
        self.choice = chosen
        fresh = [i for i, kind in chosen if kind is Kind.FRESH]
        stale = [i for i, kind in chosen if kind is Kind.STALE]
        assert chosen == [*((i, Kind.FRESH) for i in fresh), *((i, Kind.STALE) for i in stale)]
        assert len(fresh) == NUM_FRESH
        assert set(fresh) <= set(self.waiting())
        assert set(stale) <= self.eligible()
        assert len(set(stale)) == len(stale) == min(NUM_STALE, len(self.eligible()))
        for sampled in batch.groups:
            assert same(sampled.group, self.groups[sampled.group_id - 1])
            assert sampled.uses == sum(sampled.group_id == i for batch in self.steps for i, _ in batch)

    @precondition(lambda self: not self.choice and len(self.waiting()) >= NUM_FRESH)
    @rule()
    def sample_takes_the_earliest_due(self):
        expected = self.waiting()[:NUM_FRESH]
        self.sample()
        assert [i for i, _ in self.choice[:NUM_FRESH]] == expected

    @precondition(lambda self: self.choice)
    @rule()
    def commit(self):
        self.store.commit(step=len(self.steps), group_ids=[i for i, _ in self.choice])
        self.steps.append(self.choice)
        self.choice = []

    @precondition(lambda self: self.steps)
    @rule(data=st.data())
    def commit_again(self, data):
        step = data.draw(st.integers(0, len(self.steps) - 1))
        self.store.commit(step=step, group_ids=[i for i, _ in self.steps[step]])

    @rule(data=st.data())
    def rewind(self, data):
        step = data.draw(st.integers(0, len(self.steps)))
        usable_before = {i for i in range(1, len(self.groups) + 1) if i not in self.dead}
        del self.steps[step:]
        self.choice = []
        undone = {i for i in usable_before if self.groups[i - 1].newest_version > step}
        assert self.store.rewind(step) == sum(self.groups[i - 1].num_scored >= 2 for i in undone)
        self.dead |= undone

    @rule()
    def reopen(self):
        self.store.close()
        self.store = ReplayStore(self.directory / "store.sqlite3")

    @invariant()
    def the_store_says_what_the_model_says(self):
        assert self.store.version == len(self.steps)
        assert self.store.keys() == [g.key for g in self.groups]
        assert list(self.store.waiting()) == self.waiting()
        assert set(self.store.stale_eligible(step=len(self.steps), max_replay_lag=MAX_REPLAY_LAG)) == self.eligible()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
