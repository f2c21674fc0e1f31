from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.dispatcher import Dispatcher
from replay.ledger import PromptLedger
from replay.limiter import LagLimiter
from replay.rows import ROW
from replay.serialize import parse_key

# The example of the module's docstring: F = 2, max_lag = 1, step 5; one group of version 4, two leases of version 5.
EXAMPLE = LagLimiter(max_lag=1, num_fresh=2, steps=100)


def grant(limiter, version, *, waiting=(), in_flight=(), next_step=5, count=9):
    return limiter.grant(
        worker="r0", version=version, count=count, waiting=waiting, in_flight=in_flight, next_step=next_step
    )


@pytest.mark.parametrize(("version", "expected"), [(5, 1), (4, 1), (3, 0)])
def test_the_worked_example_grants_what_it_says(version, expected):
    assert grant(EXAMPLE, version, waiting=[4], in_flight=[5, 5]).count == expected


def test_the_worked_example_waits_for_the_old_lease():
    assert EXAMPLE.lacking([5, 5], [4], next_step=5) == (
        "step 5 has its 2 fresh groups, but one of 1 prompts in flight was leased at version 4 "
        "and would exceed max_lag=1 later"
    )
    assert EXAMPLE.lacking([5, 5], [5, 5], next_step=5) == ""
    assert EXAMPLE.lacking([4, 5], [5], next_step=5) == ""
    assert EXAMPLE.lacking([5], [4], next_step=5) == "step 5 has 1 of 2 fresh groups, 1 prompts are in flight"


def test_without_lag_every_version_gets_exactly_one_batch():
    limiter = LagLimiter(max_lag=0, num_fresh=3, steps=100)
    assert grant(limiter, 7, next_step=7).count == 3
    assert grant(limiter, 7, next_step=7, waiting=[7], in_flight=[7, 7]).count == 0
    assert grant(limiter, 7, next_step=8).count == 0
    assert grant(limiter, 6, next_step=7).count == 0


def test_at_most_one_batch_per_version_within_the_lag_is_outstanding():
    limiter = LagLimiter(max_lag=2, num_fresh=4, steps=100)
    assert grant(limiter, 5, count=99).count == 12
    assert grant(limiter, 5, count=99, in_flight=[5] * 12).count == 0


def test_an_old_worker_is_told_what_it_waits_for():
    limiter = LagLimiter(max_lag=2, num_fresh=4, steps=100)
    answer = grant(limiter, 3, next_step=7)
    assert (answer.count, answer.exhausted) == (0, False)
    assert answer.reason == "worker r0 holds version 3, step 7 with max_lag=2 needs at least 5: waiting for its weights"


def test_a_worker_of_an_undone_history_gets_nothing():
    answer = grant(EXAMPLE, 9)
    assert answer.count == 0
    assert "worker r0 holds version 9, but the learner is at step 5" in answer.reason


def test_a_full_pipeline_says_that_the_learner_is_awaited():
    answer = grant(EXAMPLE, 5, waiting=[5, 5], in_flight=[5, 5])
    assert answer.reason == (
        "2 fresh groups wait and 2 prompts are in flight: more of version 5 would exceed max_lag=1; "
        "waiting for the learner to take step 5"
    )


def test_the_last_steps_ask_for_no_more_than_they_need_and_keep_the_workers_until_all_is_there():
    limiter = LagLimiter(max_lag=2, num_fresh=2, steps=6)
    assert grant(limiter, 5).count == 2
    assert grant(limiter, 5, count=3).count == 2  # although six would be in time
    assert grant(limiter, 5, count=2).reason == ""
    waiting_for_it = grant(limiter, 5, waiting=[5], in_flight=[5])
    assert (waiting_for_it.count, waiting_for_it.exhausted) == (0, False)  # that one may still expire
    assert waiting_for_it.reason == "the groups of all 6 steps wait or are in flight (1): waiting for these"
    done = grant(limiter, 5, waiting=[5, 5])
    assert (done.count, done.exhausted) == (0, True)
    assert grant(limiter, 6, next_step=6).exhausted


versions = st.lists(st.integers(0, 6), max_size=6)


def a_schedule_exists(limiter, outstanding, next_step):
    """By brute force: some order of consumption keeps every lag within the bound."""
    return any(
        all(next_step + i // limiter.num_fresh - v <= limiter.max_lag for i, v in enumerate(order))
        for order in permutations(outstanding)
    )


@settings(deadline=None)
@given(versions, st.integers(0, 2), st.integers(1, 3), st.integers(0, 6))
def test_feasible_means_that_some_order_meets_every_bound(outstanding, max_lag, num_fresh, next_step):
    limiter = LagLimiter(max_lag=max_lag, num_fresh=num_fresh, steps=100)
    assert limiter.feasible(outstanding, next_step=next_step) == a_schedule_exists(limiter, outstanding, next_step)


@settings(deadline=None)
@given(versions, st.integers(0, 2), st.integers(1, 3), st.integers(0, 6), st.integers(0, 6))
def test_room_is_the_largest_number_that_stays_feasible(outstanding, max_lag, num_fresh, next_step, version):
    limiter = LagLimiter(max_lag=max_lag, num_fresh=num_fresh, steps=100)
    if not limiter.feasible(outstanding, next_step=next_step):
        return
    room = limiter.room(outstanding, version=version, next_step=next_step)
    assert limiter.feasible([*outstanding, *[version] * room], next_step=next_step)
    assert not limiter.feasible([*outstanding, *[version] * (room + 1)], next_step=next_step)


@settings(deadline=None)
@given(versions, st.integers(0, 2), st.integers(1, 3), st.integers(0, 6))
def test_kept_is_feasible_and_leaves_nothing_out_that_would_fit(outstanding, max_lag, num_fresh, next_step):
    limiter = LagLimiter(max_lag=max_lag, num_fresh=num_fresh, steps=100)
    flags = limiter.kept(outstanding, next_step=next_step)
    kept = [v for v, keep in zip(outstanding, flags, strict=True) if keep]
    assert limiter.feasible(kept, next_step=next_step)
    for version, keep in zip(outstanding, flags, strict=True):
        assert keep or not limiter.feasible([*kept, version], next_step=next_step)


def make_rows(*groups):
    """Rows from (id, key, oldest version, newest version)."""
    rows = np.zeros(len(groups), dtype=ROW)
    for row, (group_id, key, oldest, newest) in zip(rows, groups, strict=True):
        row["id"], row["oldest_version"], row["newest_version"] = group_id, oldest, newest
        row["epoch"], row["prompt_index"] = parse_key(key)
    return rows


class Run:
    """A whole run without disk, engine or event loop: workers, a learner, and the dispatcher between them."""

    def __init__(self, *, max_lag, num_fresh, steps, workers):
        limiter = LagLimiter(max_lag=max_lag, num_fresh=num_fresh, steps=steps)
        ledger = PromptLedger(num_prompts=5, seed=0)
        self.desk = Dispatcher(limiter=limiter, ledger=ledger, waiting={}, next_step=0)
        self.version = 0  # the learner's
        self.holds = {f"r{i}": 0 for i in range(workers)}
        self.generating = []  # leases, also those that have expired: their workers do not know
        self.oldest = {}  # group id -> oldest version
        self.in_store = set()
        self.leased_at = []
        self.training = False

    def lease(self, worker, count=1):
        version = self.holds[worker]
        granted = self.desk.grant(worker=worker, version=version, count=count)
        leases = self.desk.lease(worker=worker, version=version, count=granted.count, now_s=0.0, lease_s=1.0)
        self.generating += leases
        self.leased_at += [version] * len(leases)
        limiter = self.desk.limiter
        assert len(self.desk.ledger.live) + len(self.desk.waiting) <= limiter.num_fresh * (limiter.max_lag + 1)
        return granted

    def finish(self, lease, oldest, *, scored=True):
        """The worker answers, in time or not."""
        self.generating.remove(lease)
        if lease.key in self.in_store:
            return
        group_id = len(self.oldest)
        rows = make_rows((group_id, lease.key, oldest, oldest))
        unusable = self.desk.unusable(rows, [scored])
        if lease.key in self.desk.ledger.live and self.desk.ledger.live[lease.key].lease is lease:
            assert not unusable, "a group under a live lease always fits"
        self.in_store.add(lease.key)
        self.oldest[group_id] = oldest
        self.desk.appended(rows[0], waits=scored and not unusable)

    def try_sample(self):
        if self.training or self.version == self.desk.limiter.steps or self.desk.lacking():
            return False
        batch = self.desk.earliest_due()
        assert batch == sorted(self.desk.waiting, key=lambda i: (self.oldest[i], i))[: len(batch)]
        assert len(batch) == self.desk.limiter.num_fresh
        for group_id in batch:
            assert 0 <= self.version - self.oldest[group_id] <= self.desk.limiter.max_lag
        self.desk.taken(self.version, batch)
        self.training = True
        return True

    def try_commit(self):
        if self.training:
            self.training = False
            self.version += 1


@settings(deadline=None)
@given(
    max_lag=st.integers(0, 3),
    num_fresh=st.integers(1, 3),
    steps=st.integers(1, 8),
    workers=st.integers(1, 3),
    data=st.data(),
)
def test_whatever_the_order_no_lag_exceeds_its_bound_and_the_run_ends(max_lag, num_fresh, steps, workers, data):
    run = Run(max_lag=max_lag, num_fresh=num_fresh, steps=steps, workers=workers)
    moves = ["lease", "lease", "finish", "finish", "unscored", "expire", "release", "pull", "sample", "commit"]
    for move in data.draw(st.lists(st.sampled_from(moves), max_size=120)):
        worker = data.draw(st.sampled_from(sorted(run.holds)))
        if move == "lease":
            run.lease(worker, data.draw(st.integers(1, 4)))
        elif move in ("finish", "unscored") and run.generating:
            lease = data.draw(st.sampled_from(run.generating))
            newest_weights = max(run.version, lease.version)
            oldest = data.draw(st.integers(lease.version, newest_weights))
            run.finish(lease, oldest, scored=move == "finish")
        elif move == "expire":
            run.desk.ledger.expire(1.0)  # all of them; their answers come late
        elif move == "release" and run.generating:
            lease = data.draw(st.sampled_from(run.generating))
            held = run.desk.ledger.live.get(lease.key)
            if held is not None and held.lease is lease:
                run.desk.ledger.release(worker=held.worker, keys=[lease.key])
                run.generating.remove(lease)
        elif move == "pull":
            run.holds[worker] = run.version
        elif move == "sample":
            run.try_sample()
        elif move == "commit":
            run.try_commit()
    # From here on nobody fails: the run must come to its end, one step per round at least.
    for _ in range(steps + 1):
        for lease in list(run.generating):
            run.finish(lease, lease.version)
        run.try_commit()
        run.holds["r0"] = run.version
        while run.desk.lacking() and run.version < steps:
            granted = run.lease("r0", 100)
            assert granted.count > 0, granted.reason
            for lease in list(run.generating):
                run.finish(lease, lease.version)
        run.try_sample()
    assert run.version == steps
    assert run.lease("r0").exhausted
    assert not run.desk.ledger.live


@settings(deadline=None)
@given(num_fresh=st.integers(1, 3), steps=st.integers(1, 5), data=st.data())
def test_without_lag_the_run_leases_one_batch_per_version(num_fresh, steps, data):
    run = Run(max_lag=0, num_fresh=num_fresh, steps=steps, workers=2)
    while run.version < steps:
        for worker in data.draw(st.permutations(sorted(run.holds))):
            run.lease(worker, data.draw(st.integers(1, 4)))
        if run.generating:
            run.finish(data.draw(st.sampled_from(run.generating)), run.version)
        if run.try_sample():
            run.try_commit()
            run.holds = dict.fromkeys(run.holds, run.version)
    assert run.leased_at == [version for version in range(steps) for _ in range(num_fresh)]


def run_with_weights_every(sync_every, *, max_lag, steps=12):
    """The reason why a run stops whose only worker gets the weights of every ``sync_every``-th version; or nothing."""
    run = Run(max_lag=max_lag, num_fresh=2, steps=steps, workers=1)
    while run.version < steps:
        if run.version % sync_every == 0:
            run.holds["r0"] = run.version
        while run.desk.lacking():
            granted = run.lease("r0", 100)
            if granted.count == 0:
                return granted.reason
            for lease in list(run.generating):
                run.finish(lease, lease.version)
        assert run.try_sample()
        run.try_commit()
    return ""


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_weights_may_come_as_seldom_as_every_max_lag_plus_first_step(max_lag):
    for sync_every in range(1, max_lag + 2):
        assert run_with_weights_every(sync_every, max_lag=max_lag) == ""
    # Step max_lag + 1 is the first for which version 0 is too old, and version max_lag + 2 comes after it.
    stopped = run_with_weights_every(max_lag + 2, max_lag=max_lag)
    assert f"holds version 0, step {max_lag + 1} with max_lag={max_lag} needs at least 1: waiting" in stopped


def test_a_group_that_comes_too_late_is_told_from_one_that_still_fits():
    run = Run(max_lag=1, num_fresh=1, steps=9, workers=1)
    run.lease("r0", 2)
    late, later = run.generating
    run.desk.ledger.expire(1.0)
    run.lease("r0", 2)  # the same two prompts, leased again
    assert [lease.key for lease in run.generating] == [late.key, later.key] * 2

    def unusable(*groups, fresh=True):
        return run.desk.unusable(make_rows(*groups), [fresh] * len(groups))

    assert unusable((1, late.key, 0, 0)) == {}  # takes the place of the second lease
    assert unusable((1, "0.9", 0, 0)) == {1: "late"}  # steps 0 and 1 are full
    assert unusable((1, "0.9", 0, 0), fresh=False) == {}  # it would not train as a fresh one anyway
    assert unusable((1, late.key, 0, 1)) == {1: "ahead"}
    run.desk.ledger.expire(1.0)
    strangers = [(i, f"7.{i}", 0, 0) for i in range(3)]
    assert unusable(*strangers) == {2: "late"}  # each takes room from those behind it
