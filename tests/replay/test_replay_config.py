import pytest

from replay.config import ReplayConfig


def check(*, groups_per_step=16, minibatches=4, steps=100, checkpoint_every=10, keep_checkpoints=2, **replay):
    ReplayConfig(**replay).check_against(
        groups_per_step=groups_per_step,
        minibatches=minibatches,
        steps=steps,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
    )


def refused(call, *parts, **settings):
    with pytest.raises(ValueError, match="replay") as error:
        call(**settings)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sample": "fresh"},  # the default stale_fraction belongs to other policies
        {"sample": "fresh", "max_uses": 1, "samples_per_insert": 1.0, "max_replay_lag": 0, "evict_after_lag": 2},
        {"sample": "mixed", "stale_fraction": 0.0, "max_replay_lag": 0, "max_uses": 1},
        {"sample": "mixed", "priority": "uses", "priority_exponent": 2.0},
        {"sample": "mixed", "samples_per_insert": 2.0, "max_uses": 2},
        {"sample": "priority", "samples_per_insert": 4.0, "skip_no_signal": "all"},
        {"sample": "window", "samples_per_insert": 1.0, "max_uses": 2},
        {"sample": "window", "samples_per_insert": 4.0, "max_uses": 4, "max_lag": 3, "max_replay_lag": 3},
        {"evict_after_lag": 16, "capacity_gb": 0.5, "shards": 4},
        {"capacity_groups": 8 * 3 + 16 * 20},
    ],
)
def test_settings_that_go_together_are_accepted(settings):
    check(**settings)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"sample": "windows"}, ["replay.sample=windows", "did you mean window?"]),
        ({"priority": "reward"}, ["replay.priority=reward is not one of advantage, age, uses"]),
        ({"skip_no_signal": "fresh"}, ["replay.skip_no_signal=fresh is not one of none, stale, all"]),
        ({"priority_exponent": -1.0}, ["replay.priority_exponent=-1.0 must lie between"]),
        ({"priority_exponent": float("nan")}, ["replay.priority_exponent=nan must lie between"]),
        ({"shards": 0}, ["replay.shards=0 must be at least 1"]),
        ({"min_verdicts": 1}, ["replay.min_verdicts=1 is less than 2", "set it to 2 or more"]),
        ({"max_uses": 0}, ["replay.max_uses=0 must be at least 1"]),
        ({"capacity_groups": 0}, ["replay.capacity_groups=0 must be at least 1"]),
        ({"capacity_gb": 0.0}, ["replay.capacity_gb=0.0 must be greater than 0"]),
        ({"samples_per_insert": 0.5}, ["replay.samples_per_insert=0.5 must lie between 1.0"]),
        ({"stale_fraction": 1.0}, ["replay.stale_fraction=1.0", "a step needs fresh groups"]),
        ({"sample": "window"}, ["replay.sample=window needs replay.samples_per_insert", "set it to 2"]),
        (
            {"sample": "fresh", "samples_per_insert": 2.0},
            ["replay.samples_per_insert=2 contradicts replay.sample=fresh", "set samples_per_insert=null"],
        ),
        ({"max_uses": 1}, ["replay.max_uses=1", "replay.stale_fraction=0.5", "or sample=fresh"]),
        (
            {"sample": "window", "samples_per_insert": 2.0, "max_uses": 1},
            ["replay.max_uses=1", "replay.sample=window with replay.samples_per_insert=2"],
        ),
        (
            {"max_replay_lag": 0},
            ["replay.max_replay_lag=0 allows no stale group", "replay.stale_fraction=0.5", "set max_replay_lag to 1"],
        ),
        (
            {"sample": "window", "samples_per_insert": 2.0, "max_lag": 4, "max_replay_lag": 3},
            ["replay.max_replay_lag=3 is less than replay.max_lag=4", "raise max_replay_lag"],
        ),
        (
            {"evict_after_lag": 15},
            ["replay.evict_after_lag=15", "replay.max_replay_lag=16", "raise evict_after_lag to 16"],
        ),
        (
            {"max_lag": 20, "evict_after_lag": 16},
            ["replay.evict_after_lag=16", "replay.max_lag=20", "raise evict_after_lag to 20"],
        ),
        (
            {"sample": "fresh", "max_lag": 3, "evict_after_lag": 2},
            ["replay.evict_after_lag=2", "replay.max_lag=3", "raise evict_after_lag to 3"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_with_a_way_out(settings, parts):
    refused(ReplayConfig, *parts, **settings)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"stale_fraction": 0.9, "groups_per_step": 1},
            ["replay.stale_fraction=0.9 of learner.groups_per_step=1 leaves no fresh group", "lower stale_fraction"],
        ),
        (
            {"sample": "window", "samples_per_insert": 8.0, "minibatches": 4},
            ["learner.minibatches=4 exceeds the 2 groups", "replay.samples_per_insert=8", "lower minibatches or"],
        ),
        (
            {"samples_per_insert": 1.5},
            ["replay.samples_per_insert=1.5 is less than the 2 that", "replay.stale_fraction=0.5", "raise it to 2"],
        ),
        (
            {"sample": "priority", "stale_fraction": 0.75, "max_uses": 3},
            ["replay.max_uses=3 is less than the 4 uses", "4 new groups per step", "or lower stale_fraction"],
        ),
        (
            {"sample": "window", "samples_per_insert": 4.0, "max_uses": 3},
            ["replay.max_uses=3 is less than the 4 uses", "or lower samples_per_insert"],
        ),
        (  # 4 new groups per step: 8 of two steps for the 12 stale ones
            {"stale_fraction": 0.75, "max_replay_lag": 2},
            ["replay.max_replay_lag=2", "at most 8 groups", "the 12 that replay.stale_fraction=0.75"],
        ),
        (  # 4 new groups per step: 12 of this step and two before for a batch of 16
            {"sample": "window", "samples_per_insert": 4.0, "max_replay_lag": 2},
            ["replay.max_replay_lag=2", "at most 12 groups", "the 16 that replay.sample=window"],
        ),
        (
            {"capacity_groups": 343},
            [
                "replay.capacity_groups=343 is less than the 344 groups",
                "8 new groups × (max_lag=2 + 1) + groups_per_step=16 × checkpoint_every=10 × keep_checkpoints=2",
                "raise it to 344",
            ],
        ),
        (
            {"capacity_groups": 1623, "checkpoint_every": 0},
            ["the 1624 groups", "8 new groups × (max_lag=2 + 1) + groups_per_step=16 × steps=100"],
        ),
        ({"capacity_groups": 183, "steps": 10}, ["the 184 groups", "groups_per_step=16 × steps=10)"]),
    ],
)
def test_settings_that_could_not_work_with_this_learner_are_refused_with_a_way_out(settings, parts):
    refused(check, *parts, **settings)


@pytest.mark.parametrize(
    ("settings", "fresh", "stale"),
    [
        ({"sample": "fresh"}, 16, 0),
        ({"sample": "mixed"}, 8, 8),
        ({"sample": "priority", "stale_fraction": 0.3}, 11, 5),
        ({"sample": "window", "samples_per_insert": 1.0}, 16, 0),
        ({"sample": "window", "samples_per_insert": 3.0}, 6, 10),
    ],
)
def test_a_batch_is_fresh_and_stale_groups_as_the_policy_says(settings, fresh, stale):
    config = ReplayConfig(**settings)
    assert (config.num_fresh(16), config.num_stale(16)) == (fresh, stale)


def test_a_window_waits_for_no_more_groups_than_the_quotient_says():
    assert ReplayConfig(sample="window", samples_per_insert=1.4).num_fresh(21) == 15  # 21 / 1.4 is 15.000000000000002


def test_a_window_skips_groups_without_signal_altogether_or_not_at_all():
    def rule(skip, **settings):
        return ReplayConfig(skip_no_signal=skip, **settings).no_signal_rule

    window = {"sample": "window", "samples_per_insert": 2.0}
    assert [rule(skip, **window) for skip in ("none", "stale", "all")] == ["none", "all", "all"]
    assert [rule(skip) for skip in ("none", "stale", "all")] == ["none", "stale", "all"]


def test_capacity_in_gib_is_counted_in_bytes():
    assert ReplayConfig(capacity_gb=0.5).capacity_bytes == 1 << 29
    assert ReplayConfig().capacity_bytes is None


class Learner:
    """Which groups a run needs: a count of the formula's terms by going through a run step by step."""

    def __init__(self, config, groups_per_step, steps, checkpoint_every, keep_checkpoints):
        checkpoints = [0]  # the beginning, until there are checkpoints
        outstanding = config.num_fresh(groups_per_step) * (config.max_lag + 1)
        self.most = 0
        for step in range(steps):
            trained_since = (step + 1 - checkpoints[0]) * groups_per_step  # this step's batch included
            self.most = max(self.most, outstanding + trained_since)
            if checkpoint_every and (step + 1) % checkpoint_every == 0:
                checkpoints = [*(c for c in checkpoints if c > 0), step + 1][-keep_checkpoints:]


@pytest.mark.parametrize(("checkpoint_every", "keep_checkpoints"), [(0, 1), (1, 1), (3, 1), (3, 2), (5, 4), (50, 2)])
def test_the_number_of_needed_groups_is_what_a_run_comes_to(checkpoint_every, keep_checkpoints):
    config = ReplayConfig()
    needed, _ = config.needed_groups(
        groups_per_step=16, steps=40, checkpoint_every=checkpoint_every, keep_checkpoints=keep_checkpoints
    )
    assert needed == Learner(config, 16, 40, checkpoint_every, keep_checkpoints).most
