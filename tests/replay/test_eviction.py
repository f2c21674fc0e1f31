import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.config import GIB, ReplayConfig
from replay.eviction import Eviction, merged
from replay.rows import ROW


def held_rows(*groups):
    """Rows from (id, oldest version, bytes), in the order given."""
    rows = np.zeros(len(groups), dtype=ROW)
    for row, (group_id, version, num_bytes) in zip(rows, groups, strict=True):
        row["id"], row["oldest_version"], row["num_bytes"] = group_id, version, num_bytes
    return rows


def look(page, *, needed=(), step=10, held_groups=None, held_bytes=None, num_incoming=0, **config):
    return Eviction(ReplayConfig(stale_fraction=0.0, max_lag=1, **config)).look(
        page,
        step=step,
        needed=set(needed),
        held_groups=len(page) if held_groups is None else held_groups,
        held_bytes=int(page["num_bytes"].sum()) if held_bytes is None else held_bytes,
        num_incoming=num_incoming,
    )


FIVE = held_rows((4, 2, 100), (1, 3, 100), (2, 3, 100), (5, 8, 100), (6, 9, 100))


def test_nothing_goes_without_a_setting_that_says_so():
    assert not Eviction(ReplayConfig()).enabled
    assert look(FIVE).group_ids == ()
    assert look(FIVE).done


@pytest.mark.parametrize(
    "setting", [{"evict_after_lag": 16}, {"max_uses": 2}, {"capacity_groups": 9}, {"capacity_gb": 1.0}]
)
def test_each_setting_enables_it(setting):
    assert Eviction(ReplayConfig(**setting)).enabled


def test_by_lag_goes_what_exceeds_it():
    victims = look(FIVE, evict_after_lag=7)  # step 10: versions 2 and, just not, 3
    assert (victims.group_ids, victims.num_bytes, victims.done) == ((4,), 100, True)
    assert look(FIVE, evict_after_lag=6).group_ids == (4, 1, 2)


def test_a_page_that_lags_to_its_end_asks_for_the_next_one():
    assert not look(FIVE[:3], evict_after_lag=6).done
    assert not look(FIVE[:3], evict_after_lag=6, needed=[1, 2, 4]).done
    assert look(FIVE[:0], evict_after_lag=6).done


def test_by_capacity_go_the_oldest_versions_then_the_lowest_ids():
    victims = look(FIVE, capacity_groups=3)
    assert (victims.group_ids, victims.num_bytes, victims.done) == ((4, 1), 200, True)


def test_by_bytes_goes_as_little_as_frees_enough():
    page = held_rows((1, 0, 300), (2, 0, 50), (3, 1, 600))
    assert look(page, capacity_gb=950 / GIB).group_ids == ()
    assert look(page, capacity_gb=949 / GIB).group_ids == (1,)
    assert look(page, capacity_gb=650 / GIB).group_ids == (1,)
    assert look(page, capacity_gb=649 / GIB).group_ids == (1, 2)


def test_what_is_needed_stays_and_younger_ones_go_in_its_place():
    victims = look(FIVE, capacity_groups=3, needed=[4, 2])
    assert victims.group_ids == (1, 5)
    assert look(FIVE, evict_after_lag=6, needed=[1]).group_ids == (4, 2)


def test_a_page_that_does_not_suffice_asks_for_the_next_one():
    victims = look(FIVE[:2], held_groups=5, held_bytes=500, capacity_groups=2)
    assert (victims.group_ids, victims.done) == ((4, 1), False)
    rest = look(FIVE[2:], held_groups=3, held_bytes=300, capacity_groups=2)
    assert (rest.group_ids, rest.done) == ((2,), True)
    assert not look(FIVE, needed=[1, 2, 4, 5, 6], capacity_groups=4).done


def test_there_is_room_for_groups_that_are_to_come():
    assert look(FIVE, capacity_groups=6, num_incoming=3).group_ids == (4, 1)
    assert look(FIVE, capacity_gb=600 / GIB, num_incoming=3).group_ids == (4, 1)  # at 100 bytes each


def test_what_was_used_often_enough_goes_once_it_is_not_needed():
    uses = [(1, 1), (2, 2), (3, 3), (4, 2)]
    assert Eviction(ReplayConfig(max_uses=2)).used_up(uses, needed={4}) == [2, 3]
    assert Eviction(ReplayConfig()).used_up(uses, needed=set()) == []


def test_room_is_what_the_tighter_capacity_leaves():
    eviction = Eviction(ReplayConfig(capacity_groups=10, capacity_gb=900 / GIB))
    assert eviction.room(held_groups=5, held_bytes=400, in_flight=2).count == 3
    assert eviction.room(held_groups=5, held_bytes=500, in_flight=2).count == 2  # 400 bytes are 4 groups
    assert eviction.room(held_groups=0, held_bytes=0, in_flight=2).count == 8
    assert Eviction(ReplayConfig()).room(held_groups=5, held_bytes=500, in_flight=2).count == sys.maxsize


def test_a_full_store_says_what_it_waits_for():
    full = Eviction(ReplayConfig(capacity_groups=512)).room(held_groups=512, held_bytes=1, in_flight=0)
    assert full.count == 0
    assert full.reason == (
        "replay store is full: 512 groups of replay.capacity_groups=512 are all still needed; waiting for a checkpoint "
        "after which older groups are not, or raise the capacity"
    )
    over = Eviction(ReplayConfig(capacity_gb=2.0)).room(held_groups=4, held_bytes=3 * GIB, in_flight=7)
    assert over.count == 0
    assert "4 groups and 7 prompts in flight of replay.capacity_gb=2 (3 GiB held) are all" in over.reason


def test_pages_of_shards_are_merged_as_far_as_all_of_them_reach():
    one = held_rows((1, 2, 0), (3, 4, 0))
    two = held_rows((4, 1, 0), (2, 4, 0))
    last = held_rows((9, 3, 0))
    assert merged([one, two, last], limit=3)["id"].tolist() == [4, 1, 9, 2, 3]
    assert merged([one, two, last], limit=2)["id"].tolist() == [4, 1, 9, 2]  # after (4, 2) shard two may hold more
    assert len(merged([one[:0], two[:0]], limit=2)) == 0


@settings(deadline=None)
@given(
    groups=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 50)), max_size=25),
    needed=st.sets(st.integers(1, 25)),
    step=st.integers(0, 15),
    limit=st.integers(1, 4),
    shards=st.integers(1, 3),
    num_incoming=st.integers(0, 3),
    lag=st.none() | st.integers(1, 10),
    capacity=st.none() | st.integers(1, 20),
    num_bytes=st.none() | st.integers(1, 600),
)
def test_what_is_needed_never_goes_and_what_must_go_does(
    groups, needed, step, limit, shards, num_incoming, lag, capacity, num_bytes
):
    config = ReplayConfig(
        stale_fraction=0.0,
        max_lag=1,
        evict_after_lag=lag,
        capacity_groups=capacity,
        capacity_gb=None if num_bytes is None else num_bytes / GIB,
    )
    eviction = Eviction(config)
    held = {i: group for i, group in enumerate(groups, start=1)}
    order = sorted(held, key=lambda i: (held[i][0], i))
    evicted = []
    after = (-1, 0)
    while True:
        there = [i for i in order if i in held and (held[i][0], i) > after]
        pages = [held_rows(*[(i, *held[i]) for i in there if i % shards == shard][:limit]) for shard in range(shards)]
        page = merged(pages, limit=limit)
        sizes = [size for _, size in held.values()]
        victims = eviction.look(
            page,
            step=step,
            needed=needed,
            held_groups=len(held),
            held_bytes=sum(sizes),
            num_incoming=num_incoming if num_bytes is None else 0,
        )
        assert victims.num_bytes == sum(held[i][1] for i in victims.group_ids)
        evicted += victims.group_ids
        for i in victims.group_ids:
            del held[i]
        if victims.done:
            break
        after = (int(page["oldest_version"][-1]), int(page["id"][-1]))

    assert not needed.intersection(evicted)
    free = [i for i in held if i not in needed]
    if lag is not None:
        assert all(step - held[i][0] <= lag for i in free)
    incoming = num_incoming if num_bytes is None else 0
    if capacity is not None:
        assert len(held) + incoming <= capacity or not free
    if num_bytes is not None:
        assert sum(size for _, size in held.values()) <= num_bytes or not free
    if evicted and free:  # the oldest went first
        last = max((groups[i - 1][0], i) for i in evicted)
        assert all((held[i][0], i) > last for i in free)
