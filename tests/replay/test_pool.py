from collections import Counter
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.config import ReplayConfig
from replay.pool import Pool
from replay.rows import ROW
from replay.sampling import make_policy


def make_rows(ids, *, version=0, spread=0.5):
    """Rows of scored groups with signal; ``version`` and ``spread`` are one for all, or one each."""
    rows = np.zeros(len(ids), dtype=ROW)
    rows["id"] = ids
    rows["oldest_version"] = version
    rows["newest_version"] = version
    rows["reward_spread"] = spread
    rows["num_with_reward"] = 2
    rows["has_signal"] = True
    return rows


def make_pool(ids=(), *, uses=1, version=0, spread=0.5, shards=1, **config):
    pool = Pool(make_policy(ReplayConfig(**config)), shards=shards)
    pool.add(make_rows(ids, version=version, spread=spread), np.full(len(ids), uses))
    return pool


def draw(pool, k, *, seed=0, step=0, without=()):
    return pool.draw(k, rng=np.random.default_rng([seed, step]), step=step, without=without)


def ids_of(drawn):
    return [group_id for group_id, _, _ in drawn]


class Offset:
    """A generator whose one uniform number is chosen by the test."""

    def __init__(self, offset):
        self.offset = offset

    def random(self):
        return self.offset


def weighted(weights, k, **config):
    """A pool whose groups 1, 2, … have these weights: (spread + 0.01)^1."""
    spread = np.array(weights) - 0.01
    return make_pool(range(1, len(weights) + 1), spread=spread, sample="priority", **config)


# Membership


def test_a_group_is_in_from_add_to_remove():
    pool = make_pool([3, 5])
    assert (len(pool), 3 in pool, 4 in pool, 5 in pool) == (2, True, False, True)
    pool.remove([3, 4, 10**6])
    assert (len(pool), 3 in pool) == (1, False)


def test_a_group_that_is_added_twice_counts_once_and_has_the_later_uses():
    pool = make_pool([3, 5], uses=1)
    pool.add(make_rows([5]), np.array([4]))
    assert len(pool) == 2
    assert sorted(draw(pool, 2)) == [(3, 1, 1.0), (5, 4, 1.0)]


def test_a_use_is_counted_and_the_last_one_takes_the_group_out():
    pool = make_pool([1, 2], uses=1, max_uses=3)
    pool.used([1, 9, 10**6])
    assert sorted(draw(pool, 2)) == [(1, 2, 1.0), (2, 1, 1.0)]
    pool.used([1])
    assert ids_of(draw(pool, 2)) == [2]
    pool.add(make_rows([7]), np.array([3]))
    assert 7 not in pool


def test_what_is_older_than_the_bound_expires_and_stays_out():
    pool = make_pool([1, 2, 3, 4], version=[5, 7, 6, 5])
    pool.expire(6)
    assert sorted(ids_of(draw(pool, 4))) == [2, 3]
    pool.expire(3)  # the bound never goes back
    pool.add(make_rows([8, 9], version=[5, 6]), np.array([1, 1]))
    assert sorted(ids_of(draw(pool, 4))) == [2, 3, 9]
    pool.expire(100)
    assert (len(pool), draw(pool, 4)) == (0, [])


def test_a_shard_that_is_away_takes_its_groups_along():
    pool = make_pool(range(1, 10), shards=3)  # ids 1, 4, 7 lie on shard 0
    pool.drop_shard(0)
    assert sorted(ids_of(draw(pool, 9))) == [2, 3, 5, 6, 8, 9]
    pool.drop_shard(2)
    assert sorted(ids_of(draw(pool, 9))) == [2, 5, 8]


def test_a_shard_is_told_from_others_also_where_the_range_of_ids_does_not_begin_at_its_first():
    pool = make_pool(range(100_000, 100_009), shards=4)
    pool.drop_shard(1)
    assert sorted(ids_of(draw(pool, 9))) == [i for i in range(100_000, 100_009) if (i - 1) % 4 != 1]


def test_the_oldest_version_of_a_group_is_known():
    assert make_pool([5, 6], version=[3, 4]).version(6) == 4


# Draws


@pytest.mark.parametrize("sample", ["mixed", "priority"])
def test_all_are_drawn_with_weight_one_while_there_are_no_more_than_wanted(sample):
    pool = make_pool([1, 2, 3], spread=[0.1, 0.2, 0.5], sample=sample)
    assert sorted(draw(pool, 3)) == [(1, 1, 1.0), (2, 1, 1.0), (3, 1, 1.0)]
    assert sorted(draw(pool, 9)) == [(1, 1, 1.0), (2, 1, 1.0), (3, 1, 1.0)]
    assert sorted(draw(pool, 2, without=[2])) == [(1, 1, 1.0), (3, 1, 1.0)]
    assert draw(pool, 0) == []


@pytest.mark.parametrize("sample", ["mixed", "priority"])
def test_without_keeps_groups_out_of_this_draw_only(sample):
    pool = make_pool(range(1, 101), sample=sample)
    hidden = set(range(1, 96))
    assert set(ids_of(draw(pool, 4, without=hidden))) <= {96, 97, 98, 99, 100}
    assert len(pool) == 100
    assert set(ids_of(draw(pool, 100))) == set(range(1, 101))


def test_uniform_draws_are_distinct_have_weight_one_and_hit_each_group_equally_often():
    pool = make_pool(range(1, 11))
    counts = Counter()
    for step in range(1000):
        drawn = draw(pool, 3, step=step)
        assert len(set(ids_of(drawn))) == 3
        assert all(weight == 1.0 for _, _, weight in drawn)
        counts.update(ids_of(drawn))
    # Each count is binomial(1000, 0.3): 300 ± 14.5. Five deviations.
    assert all(abs(count - 300) < 73 for count in counts.values()), counts


def test_the_example_of_the_docstring():
    pool = weighted([0.25, 0.25, 0.5], 2)
    first = pool.draw(2, rng=Offset(0.25), step=0, without=())
    second = pool.draw(2, rng=Offset(0.75), step=0, without=())
    assert sorted(ids_of(first)) == [1, 3]
    assert sorted(ids_of(second)) == [2, 3]
    for drawn in (first, second):
        assert {i: w for i, _, w in drawn} == pytest.approx({min(ids_of(drawn)): 4 / 3, 3: 2 / 3})


@pytest.mark.parametrize(
    ("weights", "k"),
    [
        ([0.1, 0.2, 0.3, 0.4], 2),
        ([0.1, 0.2, 0.3, 0.4], 3),  # the last is drawn for certain: 0.4 ≥ 1/3
        ([0.02, 0.02, 0.03, 5.0, 2.0, 0.9], 3),  # 5.0 ≥ 7.97/3 is certain, and of what is left 2.0 ≥ 2.97/2
        ([0.3] * 7, 4),
        ([1.0, 1.0, 1.0, 0.1, 0.1], 3),
    ],
)
def test_weighted_draws_are_unbiased_over_all_offsets(weights, k):
    pool = weighted(weights, k)
    value = {i: float(i * i) for i in range(1, len(weights) + 1)}
    num_offsets = 1000
    estimates = []
    for j in range(num_offsets):
        drawn = pool.draw(k, rng=Offset((j + 0.5) / num_offsets), step=0, without=())
        assert len(set(ids_of(drawn))) == k
        estimates.append(sum(weight * value[i] for i, _, weight in drawn) / k)
    # Each of the few cuts between groups is off by half an offset at most.
    assert fmean(estimates) == pytest.approx(fmean(value.values()), rel=5e-3)


def test_weighted_draws_are_unbiased_with_a_real_generator_and_groups_left_out():
    rng = np.random.default_rng(5)
    pool = weighted(rng.uniform(0.02, 1.0, 40).tolist(), 8)
    left_out = [1, 2, 3, 40]
    value = {i: np.sin(i) + 2 for i in range(1, 41)}
    mean = fmean(value[i] for i in value if i not in left_out)
    estimates = [
        sum(weight * value[i] for i, _, weight in draw(pool, 8, step=step, without=left_out)) / 8
        for step in range(1000)
    ]
    assert abs(fmean(estimates) - mean) < 5 * np.std(estimates) / np.sqrt(len(estimates))


def chances(pool, k, *, step=20, num_draws=1000):
    """How often each group is drawn, over evenly spread offsets."""
    counts = Counter()
    for j in range(num_draws):
        counts.update(ids_of(pool.draw(k, rng=Offset((j + 0.5) / num_draws), step=step, without=())))
    return {i: counts[i] / num_draws for i in sorted(counts)}


def test_a_large_advantage_is_drawn_in_proportion_to_its_power():
    pool = weighted([0.1, 0.2, 0.3], 1, priority_exponent=2.0)
    assert chances(pool, 1) == pytest.approx({1: 1 / 14, 2: 4 / 14, 3: 9 / 14}, abs=2e-3)


def test_a_group_without_signal_keeps_a_chance():
    pool = make_pool([1, 2], spread=[0.0, 0.5], sample="priority", skip_no_signal="none")
    assert chances(pool, 1) == pytest.approx({1: 1 / 52, 2: 51 / 52}, abs=2e-3)


def test_each_use_makes_a_group_less_likely():
    pool = make_pool([1, 2, 3], uses=1, sample="priority", priority="uses")
    pool.used([2, 3])
    pool.used([3])  # uses 1, 2, 3: weights 1/2, 1/3, 1/4
    assert chances(pool, 1) == pytest.approx({1: 6 / 13, 2: 4 / 13, 3: 3 / 13}, abs=2e-3)


def test_the_chance_halves_with_every_quarter_of_the_replay_lag():
    pool = make_pool([1, 2, 3], version=[20, 16, 12], sample="priority", priority="age", max_replay_lag=16)
    assert chances(pool, 1) == pytest.approx({1: 4 / 7, 2: 2 / 7, 3: 1 / 7}, abs=2e-3)


def test_chances_by_age_hold_after_a_hundred_thousand_steps():
    """Weights double every four versions: without a new anchor they would be infinite at version 4096."""
    pool = make_pool([], sample="priority", priority="age", max_replay_lag=16)
    for step in range(8, 100_009, 5000):
        pool.expire(step - 8)
        pool.add(make_rows([step, step + 1, step + 2], version=[step, step - 4, step - 8]), np.array([1, 1, 1]))
        expected = pytest.approx({step: 4 / 7, step + 1: 2 / 7, step + 2: 1 / 7}, abs=0.02)
        assert chances(pool, 1, step=step, num_draws=70) == expected


def test_the_most_extreme_weights_stay_finite_and_draw_what_they_say():
    pool = make_pool([1, 2, 3], spread=[0.0, 1e9, 1e-9], sample="priority", priority_exponent=100.0)
    [(group_id, _, weight)] = draw(pool, 1)
    assert (group_id, weight) == (2, pytest.approx(1 / 3))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 6), st.integers(0, 3), st.sampled_from([0.0, 0.2, 0.5])), min_size=1, max_size=40
    ),
    st.sampled_from(["mixed", "advantage", "uses", "age"]),
    st.integers(1, 12),
    st.randoms(),
)
def test_a_draw_depends_on_what_is_there_and_not_on_how_it_came_there(groups, how, k, random):
    config = {"sample": "mixed"} if how == "mixed" else {"sample": "priority", "priority": how}
    ids = [17_000 + 3 * i for i in range(len(groups))]
    versions, uses, spreads = (np.array(column) for column in zip(*groups, strict=True))
    at_once = make_pool([], **config)
    at_once.expire(2)
    at_once.add(make_rows(ids, version=versions, spread=spreads), uses)

    slowly = make_pool(range(1, 20), **config)  # begins elsewhere, so that its arrays begin elsewhere
    order = list(range(len(ids)))
    random.shuffle(order)
    for i in order:
        slowly.add(make_rows([ids[i]], version=versions[i], spread=spreads[i]), np.array([0]))
        for _ in range(uses[i]):
            slowly.used([ids[i]])
        draw(slowly, 2, step=1)
    slowly.remove(range(1, 20))
    slowly.add(make_rows([90_000]), np.array([0]))
    slowly.expire(2)

    assert len(slowly) == len(at_once) == int((versions >= 2).sum())
    assert draw(slowly, k, step=8) == draw(at_once, k, step=8)


def test_chances_are_the_same_to_the_last_bit_wherever_the_arrays_begin():
    ids, spread = np.arange(20_000, 23_000), np.random.default_rng(3).random(3000)
    near = make_pool(ids, spread=spread, sample="priority")
    far = make_pool([5], sample="priority")
    far.add(make_rows(ids, spread=spread), np.ones(3000, dtype=int))
    far.remove([5])
    assert all(draw(near, 16, step=step) == draw(far, 16, step=step) for step in range(20))


class Model:
    """What the pool is, said with a dictionary."""

    def __init__(self, max_uses):
        self.max_uses = max_uses
        self.groups = {}
        self.oldest = 0

    def add(self, group_id, version, uses):
        if version >= self.oldest and uses < self.max_uses:
            self.groups[group_id] = (version, uses)

    def used(self, group_id):
        if group_id in self.groups:
            version, uses = self.groups.pop(group_id)
            self.add(group_id, version, uses + 1)

    def expire(self, oldest):
        self.oldest = max(self.oldest, oldest)
        self.groups = {i: g for i, g in self.groups.items() if g[0] >= self.oldest}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_the_pool_holds_what_a_dictionary_would(data):
    pool, model = make_pool([], max_uses=3, shards=2), Model(3)
    some_id = st.integers(1, 8).map(lambda i: i * 9000)  # far apart, so that the arrays must move
    for move in data.draw(st.lists(st.sampled_from(["add", "used", "remove", "expire", "shard"]), max_size=25)):
        group_id = data.draw(some_id)
        if move == "add":
            version, uses = group_id // 20_000, data.draw(st.integers(0, 4))
            pool.add(make_rows([group_id], version=version), np.array([uses]))
            model.add(group_id, version, uses)
        elif move == "used":
            pool.used([group_id])
            model.used(group_id)
        elif move == "remove":
            pool.remove([group_id])
            model.groups.pop(group_id, None)
        elif move == "expire":
            oldest = data.draw(st.integers(0, 3))
            pool.expire(oldest)
            model.expire(oldest)
        else:
            pool.drop_shard(1)
            model.groups = {i: g for i, g in model.groups.items() if (i - 1) % 2 != 1}
        expected = sorted((i, uses, 1.0) for i, (_, uses) in model.groups.items())
        assert sorted(draw(pool, 99)) == expected
        assert len(pool) == len(expected)
