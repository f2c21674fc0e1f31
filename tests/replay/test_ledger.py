from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.ledger import PromptLedger


def make_ledger(num_prompts=4, done=(), seed=3):
    index_of_epoch = {}
    for key in done:
        epoch, index = map(int, key.split("."))
        index_of_epoch.setdefault(epoch, []).append(index)
    done_N = {epoch: np.array(indices, dtype=np.int64) for epoch, indices in index_of_epoch.items()}
    return PromptLedger(num_prompts=num_prompts, seed=seed, done=done_N)


def take(ledger, count=1, *, worker="r0", now_s=0.0):
    leases = [ledger.lease(worker=worker, version=0, now_s=now_s, lease_s=10.0) for _ in range(count)]
    return [lease.key for lease in leases]


def test_every_epoch_is_the_seeded_permutation_of_all_prompts():
    expected = [f"{e}.{i}" for e in (0, 1) for i in np.random.default_rng([3, e]).permutation(4)]
    assert take(make_ledger(), 8) == expected
    assert sorted(expected) == [f"{e}.{i}" for e in (0, 1) for i in range(4)]


def test_another_seed_gives_another_order():
    assert take(make_ledger(20, seed=1), 20) != take(make_ledger(20, seed=2), 20)


def test_a_lease_says_until_when_it_holds():
    lease = make_ledger().lease(worker="r0", version=5, now_s=100.0, lease_s=10.0)
    assert (lease.version, lease.deadline_s) == (5, 110.0)
    assert lease.key == f"{lease.epoch}.{lease.index}"


def test_an_expired_lease_is_handed_out_again_first():
    ledger = make_ledger()
    first = take(ledger, now_s=0.0)
    second = take(ledger, now_s=5.0)
    assert ledger.next_deadline_s == 10.0
    assert ledger.expire(9.9) == []
    assert ledger.expire(10.0) == first
    assert list(ledger.live) == second
    assert take(ledger) == first


def test_a_released_lease_is_handed_out_again_first():
    ledger = make_ledger()
    first, second, third = take(ledger, 3)
    assert ledger.release(worker="r0", keys=[third, first]) == [third, first]
    assert list(ledger.live) == [second]
    assert take(ledger, 2) == [third, first]


def test_a_worker_cannot_release_what_another_holds():
    ledger = make_ledger()
    (key,) = take(ledger, worker="r0")
    ledger.expire(10.0)
    assert take(ledger, worker="r1", now_s=10.0) == [key]
    assert ledger.release(worker="r0", keys=[key, "0.99"]) == []
    assert ledger.live[key].worker == "r1"


def test_an_answered_key_is_never_leased_again():
    ledger = make_ledger()
    live, expired = take(ledger, 2)
    ledger.release(worker="r0", keys=[expired])
    ahead = take(make_ledger(), 4)[3]
    for key in (live, expired, ahead):
        ledger.answered(key)
    assert ledger.live == {}
    assert ledger.next_deadline_s == float("inf")
    assert take(ledger, 5)[0] == take(make_ledger(), 3)[2]
    assert not {live, expired, ahead} & set(ledger.live)


def test_a_store_of_other_data_is_refused():
    with pytest.raises(ValueError, match=r"prompt 0\.4 does not exist: the task has 4 prompts"):
        make_ledger(4, done=["0.4"])
    with pytest.raises(ValueError, match="num_prompts=0"):
        make_ledger(0)


moves = st.lists(st.sampled_from(["lease", "answer", "late", "expire", "release", "restart"]), max_size=60)


@settings(deadline=None)
@given(moves=moves, num_prompts=st.integers(1, 4), seed=st.integers(0, 3), data=st.data())
def test_no_prompt_is_skipped_or_answered_twice_over_any_restarts(moves, num_prompts, seed, data):
    answered = Counter()  # stands for the store
    leased_ever = []
    ledger = make_ledger(num_prompts, seed=seed)
    for now_s, move in enumerate(moves):
        live = sorted(ledger.live)
        if move == "lease":
            (key,) = take(ledger, now_s=now_s)
            assert key not in live
            assert answered[key] == 0
            leased_ever.append(key)
        elif move == "answer" and live:
            key = data.draw(st.sampled_from(live))
            ledger.answered(key)
            answered[key] += 1
        elif move == "late" and (late := [k for k in leased_ever if k not in live and not answered[k]]):
            key = data.draw(st.sampled_from(late))
            ledger.answered(key)
            answered[key] += 1
        elif move == "expire":
            ledger.expire(now_s)
        elif move == "release" and live:
            ledger.release(worker="r0", keys=live[:1])
        elif move == "restart":
            ledger = make_ledger(num_prompts, seed=seed, done=answered)
    # Answer whatever comes, from a restart on, until the epoch after the last one touched is complete.
    epochs = 2 + max((int(key.split(".")[0]) for key in leased_ever), default=0)
    ledger = make_ledger(num_prompts, seed=seed, done=answered)
    while sum(answered.values()) < epochs * num_prompts:
        (key,) = take(ledger)
        ledger.answered(key)
        answered[key] += 1
    assert answered == Counter(f"{e}.{i}" for e in range(epochs) for i in range(num_prompts))
