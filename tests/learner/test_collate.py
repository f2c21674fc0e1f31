import numpy as np
import pytest
import torch

from learner.collate import LagViolation, check_lags, collate, pack, pack_row, unpack
from tests.learner.batches import batch, trajectory

OPTIONS = {
    "advantage": "mean_std",
    "minibatches": 1,
    "seed": 0,
    "exact_engine": True,
    "ranks": 1,
    "micro_batch_tokens": 100,
}


def two(*, version=0, rewards=(0.0, 1.0)):
    return [trajectory([5, 6], reward=r, version=version) for r in rewards]


def test_a_row_concatenates_trajectories_and_restarts_their_positions():
    row = pack_row([trajectory([7], prompt=(1, 2)), trajectory([8, 9], prompt=(3,))])
    assert row.token_ids_T.tolist() == [1, 2, 7, 3, 8, 9]
    assert row.position_ids_T.tolist() == [0, 1, 2, 0, 1, 2]
    assert row.index_N.tolist() == [1, 3, 4]
    assert row.target_N.tolist() == [7, 8, 9]


def test_an_empty_row_still_has_a_token_to_run_through_the_model():
    row = pack_row([])
    assert row.token_ids_T.tolist() == [0]
    assert row.index_N.tolist() == []
    micro_batch = pack([], [])
    assert micro_batch.advantage_N.shape == micro_batch.lag_N.shape == micro_batch.sequence_N.shape == (0,)


def test_a_micro_batch_carries_what_each_token_was_sampled_with():
    b = batch(
        [
            [
                trajectory([5, 6], reward=1.0, version=[3, 4], logprob=[-1.0, -2.0]),
                trajectory([7], reward=0.0, version=4),
            ]
        ],
        step=5,
    )
    layout = collate(b, **OPTIONS)
    micro_batch = pack(layout.samples, [np.array([-0.5, -0.25], np.float32), None])
    assert micro_batch.row.target_N.tolist() == [5, 6, 7]
    assert micro_batch.behavior_logp_N.tolist() == [-1.0, -2.0, -1.0]
    assert micro_batch.logp_prox_N.tolist() == [-0.5, -0.25, -1.0]
    assert micro_batch.advantage_N.tolist() == [1.0, 1.0, -1.0]
    assert micro_batch.lag_N.tolist() == [2, 1, 1]
    assert micro_batch.sequence_N.tolist() == [0, 0, 1]
    assert micro_batch.behavior_logp_N.dtype == micro_batch.advantage_N.dtype == torch.float32


def test_a_trajectory_without_a_verdict_or_without_a_response_is_left_out_entirely():
    members = [*two(), trajectory([5, 6, 7], reward=None), trajectory([], reward=1.0)]
    layout = collate(batch([members]), **OPTIONS)
    assert len(layout.samples) == 2
    assert layout.num_tokens(0) == 4
    # The empty response has a verdict: it counts in the baseline, (0 + 1 + 1) / 3, and trains no token.
    mean, deviation = 2 / 3, np.sqrt(2) / 3
    assert [s.advantage for s in layout.samples] == pytest.approx([-mean / deviation, (1 - mean) / deviation])


def test_advantages_over_the_batch_follow_their_groups_into_the_minibatches():
    # centred ±1 and ±3: D² = (1 + 1 + 9 + 9)/4 = 5, and the second group is the longer one
    groups = [
        [trajectory([5], reward=r) for r in (0.0, 2.0)],
        [trajectory([5, 6], reward=r) for r in (1.0, 7.0)],
    ]
    for seed in range(4):
        layout = collate(batch(groups), **OPTIONS | {"advantage": "batch_whitened", "minibatches": 2, "seed": seed})
        found = sorted((s.advantage, len(s.lag_N)) for s in layout.samples)
        expected = [(-3 / 5**0.5, 2), (-1 / 5**0.5, 1), (1 / 5**0.5, 1), (3 / 5**0.5, 2)]
        assert [a for a, _ in found] == pytest.approx([a for a, _ in expected])
        assert [n for _, n in found] == [n for _, n in expected]


def test_only_trajectories_with_a_stale_token_need_proximal_log_probs():
    b = batch([two(version=5), [trajectory([1, 2], version=[4, 5]), trajectory([1, 2], version=5)]], step=5)
    layout = collate(b, **OPTIONS)
    needy = [i for i, s in enumerate(layout.samples) if s.lag_N.max() > 0]
    assert len(needy) == 1
    assert layout.proximal == [[needy]]
    inexact = collate(b, **OPTIONS | {"exact_engine": False})
    assert sorted(i for members in inexact.proximal[0] for i in members) == [0, 1, 2, 3]


def test_no_proximal_pass_is_planned_when_nothing_is_stale():
    assert collate(batch([two()]), **OPTIONS | {"ranks": 2}).proximal == [[], []]


def test_every_rank_computes_the_proximal_log_probs_of_what_it_trains_in_equally_many_passes():
    groups = [[trajectory([1] * n, reward=float(n % 2), version=0) for n in range(1, 7)] for _ in range(4)]
    layout = collate(batch(groups, step=1), **OPTIONS | {"ranks": 3, "minibatches": 2, "micro_batch_tokens": 16})
    assert len({len(bins) for bins in layout.proximal}) == 1
    for rank in range(3):
        trains = [i for minibatch in layout.train for members in minibatch[rank] for i in members]
        assert sorted(i for members in layout.proximal[rank] for i in members) == sorted(trains)


@pytest.mark.parametrize(("ranks", "micro_batch_tokens"), [(1, 10), (1, 1000), (3, 10)])
def test_the_denominator_and_the_members_of_a_minibatch_do_not_depend_on_the_layout(ranks, micro_batch_tokens):
    groups = [[trajectory([1] * n, reward=float(n % 2)) for n in range(1, 5)] for _ in range(6)]
    plain = collate(batch(groups), **OPTIONS | {"minibatches": 3})
    layout = collate(
        batch(groups), **OPTIONS | {"minibatches": 3, "ranks": ranks, "micro_batch_tokens": micro_batch_tokens}
    )
    assert layout.minibatches == plain.minibatches
    assert [layout.num_tokens(m) for m in range(3)] == [20, 20, 20]
    assert [layout.num_trajectories(m) for m in range(3)] == [8, 8, 8]
    for m in range(3):
        dealt = [i for bins in layout.train[m] for members in bins for i in members]
        assert sorted(dealt) == list(layout.minibatches[m])


def test_values_of_a_row_are_split_back_into_those_of_its_trajectories():
    layout = collate(batch([[trajectory([5, 6], reward=0.0), trajectory([7], reward=1.0)]]), **OPTIONS)
    parts = unpack(layout.samples, np.array([0.1, 0.2, 0.3]))
    assert [p.tolist() for p in parts] == [[0.1, 0.2], [0.3]]


def test_a_batch_whose_verdicts_agree_has_no_budget():
    assert collate(batch([two(rewards=(1.0, 1.0))]), **OPTIONS).budget_share == 0


def test_what_a_batch_may_spend_follows_from_its_signals_and_from_the_fresh_groups_that_are_solved():
    # Three groups with a signal: 3/(3 + 32). One of two fresh groups is solved: (1 + 1)/(1 + 2), squared.
    groups = [two(rewards=(1.0, 1.0)), two(), two(), two()]
    assert collate(batch(groups, stale=[2, 3]), **OPTIONS).budget_share == pytest.approx(3 / 35 * 4 / 9)
    # A group without verdicts says nothing.
    unscored = two(rewards=(None, None))
    assert collate(batch([*groups, unscored], stale=[2, 3]), **OPTIONS).budget_share == pytest.approx(3 / 35 * 4 / 9)


def test_a_first_token_that_trains_is_refused_because_nothing_predicts_it():
    with pytest.raises(ValueError, match=r"group 0 \(prompt 0\.0\) trains its first token"):
        collate(batch([[trajectory([5], prompt=(), reward=0.0), trajectory([5], reward=1.0)]]), **OPTIONS)


def test_lags_at_their_bounds_are_accepted_and_one_more_stops_the_run():
    bounds = {"max_lag": 1, "max_replay_lag": 3}
    check_lags(batch([two(version=4), two(version=2)], step=5, stale=[1]), **bounds)
    with pytest.raises(LagViolation, match=r"fresh group 0 .* a lag of 2 > replay\.max_lag=1"):
        check_lags(batch([two(version=3)], step=5), **bounds)
    with pytest.raises(LagViolation, match=r"stale group 0 .* a lag of 4 > replay\.max_replay_lag=3"):
        check_lags(batch([two(version=1)], step=5, stale=[0]), **bounds)
    with pytest.raises(LagViolation, match="weights do not exist yet"):
        check_lags(batch([two(version=6)], step=5), **bounds)
