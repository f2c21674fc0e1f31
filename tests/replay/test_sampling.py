import numpy as np
import pytest

from replay.config import ReplayConfig
from replay.rows import ROW
from replay.sampling import (
    FreshSampling,
    MixedSampling,
    PrioritySampling,
    WindowSampling,
    fresh_candidates,
    make_policy,
    stale_candidates,
)


def candidate_rows():
    """In order: one verdict, two equal verdicts, two different ones."""
    rows = np.zeros(3, dtype=ROW)
    rows["num_with_reward"] = [1, 2, 2]
    rows["has_signal"] = [False, False, True]
    return rows


@pytest.mark.parametrize(
    ("skip", "fresh", "stale"),
    [
        ("none", [False, True, True], [False, True, True]),
        ("stale", [False, True, True], [False, False, True]),
        ("all", [False, False, True], [False, False, True]),
    ],
)
def test_groups_without_signal_are_skipped_as_the_setting_says(skip, fresh, stale):
    assert fresh_candidates(candidate_rows(), skip, 2).tolist() == fresh
    assert stale_candidates(candidate_rows(), skip, 2).tolist() == stale


def test_groups_of_fewer_verdicts_than_asked_for_are_never_drawn():
    rows = candidate_rows()
    rows["num_with_reward"] = [3, 2, 4]
    assert fresh_candidates(rows, "none", 3).tolist() == [True, False, True]
    assert stale_candidates(rows, "none", 3).tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("settings", "policy"),
    [
        ({"sample": "fresh"}, FreshSampling()),
        ({"sample": "mixed", "max_uses": 3}, MixedSampling(max_uses=3)),
        ({"sample": "window", "samples_per_insert": 2.0}, WindowSampling()),
        (
            {"sample": "priority", "priority": "age", "priority_exponent": 2.0, "max_replay_lag": 8},
            PrioritySampling(key="age", exponent=2.0, max_replay_lag=8),
        ),
    ],
)
def test_the_settings_name_the_policy(settings, policy):
    made = make_policy(ReplayConfig(**settings))
    assert made == policy
    assert type(made) is type(policy)


def weights(policy, *, spread=(0.0,), uses=(0,), versions=(0,)):
    size = max(len(spread), len(uses), len(versions))
    columns = (np.resize(np.array(column), size) for column in (spread, uses, versions))
    return np.exp2(
        policy.log2_weight(**dict(zip(("spread", "uses", "versions"), columns, strict=True))),
    )


def priority(key, exponent=1.0, max_replay_lag=16):
    return PrioritySampling(key=key, exponent=exponent, max_replay_lag=max_replay_lag)


def test_weights_are_those_of_the_docstring():
    assert weights(priority("advantage"), spread=[0.0, 0.49]).tolist() == pytest.approx([0.01, 0.5])
    assert weights(priority("advantage", 2.0), spread=[0.0, 0.49]).tolist() == pytest.approx([1e-4, 0.25])
    assert weights(priority("uses"), uses=[0, 1, 3]).tolist() == pytest.approx([1, 1 / 2, 1 / 4])
    assert weights(priority("uses", 0.5), uses=[0, 3]).tolist() == pytest.approx([1, 1 / 2])
    assert weights(priority("age"), versions=[0, 4, -16]).tolist() == pytest.approx([1, 2, 1 / 16])
    assert weights(priority("age", 2.0, 4), versions=[0, 1]).tolist() == pytest.approx([1, 4])
    assert weights(MixedSampling(), uses=[0, 5]).tolist() == [1, 1]


@pytest.mark.parametrize("key", ["advantage", "uses", "age"])
def test_an_exponent_of_0_is_uniform(key):
    assert priority(key, 0.0).uniform
    assert not priority(key, 0.5).uniform
    assert weights(priority(key, 0.0), spread=[0.0, 1.0], uses=[0, 9], versions=[0, 5]).tolist() == [1, 1]


def test_the_anchor_moves_on_before_weights_by_age_have_grown_by_2_to_the_200():
    assert priority("age").anchor_every == 800  # a quarter of a power of 2 per step
    assert priority("age", 100.0, 1).anchor_every == 1
    assert priority("age", 1e-300).anchor_every == priority("uses").anchor_every == 1 << 30
    assert priority("age", 1.0, 0).anchor_every == 50
