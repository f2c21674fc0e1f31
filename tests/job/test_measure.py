import pytest

from learner.config import LearnerConfig
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.job import measure
from r2vpo.job.config import ModelConfig, RunConfig
from r2vpo.job.measure import (
    COLLAPSE_STEPS,
    SATURATED_STEPS,
    UNSCORED_GROUPS,
    Alarms,
    StepMeter,
    outcomes_text,
    stall_text,
)
from r2vpo.records import RolloutStats, SyncRecord
from replay.config import ReplayConfig

STORE = {
    "groups": 40,
    "fresh_waiting": 8,
    "in_flight": 4,
    "stale_eligible": 16,
    "held_groups": 36,
    "held_bytes": 3600,
    "no_signal": 5,
    "unusable": {"unscored": 1, "late": 2, "ahead": 0, "damaged": 3},
    "uses": {"fresh": 24, "stale": 12},
    "shards": [{"shard": 0, "attached": True, "trouble": ""}],
    "troubles": [],
}
GOOD = {"step": 0, "learner/bad_steps": 0.0, "step/lr": 1e-3, "dual/saturated": 0.0}
HALF_BAD = GOOD | {"learner/bad_steps": 2.0}
ALL_BAD = {"step": 0, "learner/bad_steps": 4.0, "dual/saturated": 0.0}
EMPTY = {"step": 0, "learner/bad_steps": 0.0, "dual/saturated": 0.0}


def run_config(**sections) -> RunConfig:
    return RunConfig(model=ModelConfig(path="m"), **sections)


def rewarded(lowest: float, highest: float, *, silent: float = 1.0, entropy: float = 0.5) -> dict:
    rewards = {"train/reward_min": lowest, "train/reward_max": highest, "train/reward_mean": (lowest + highest) / 2}
    return GOOD | rewards | {"train/zero_signal_fraction": silent, "step/entropy": entropy}


def stats(tokens: int, busy_s: float, alive_s: float, *syncs: SyncRecord) -> RolloutStats:
    return RolloutStats(
        worker="rollout-0",
        version=3,
        groups=1,
        trajectories=tokens // 10,
        tokens=tokens,
        busy_s=busy_s,
        alive_s=alive_s,
        in_flight=1,
        waits_for="",
        new_syncs=syncs,
    )


def sync(version: int, pause_s: float) -> SyncRecord:
    return SyncRecord(worker="rollout-0", version=version, fetch_s=0.1, pause_s=pause_s, canary_gap=1e-6 * version)


@pytest.fixture
def clock(monkeypatch):
    """The meter's clock, to be moved by hand."""

    class Clock:
        now_s = 100.0

        def monotonic(self) -> float:
            return self.now_s

    monkeypatch.setattr(measure, "time", clock := Clock())
    return clock


def test_a_step_counts_what_the_workers_did_during_it_and_nothing_before(clock):
    meter = StepMeter()
    clock.now_s = 130.0
    meter.start([stats(1000, 5.0, 20.0, sync(0, 0.5))])
    clock.now_s = 132.0
    workers = [stats(1400, 6.5, 22.0, sync(1, 0.25), sync(2, 0.125))]
    metrics = meter.measure(step=0, wait_s=0.5, store=STORE, workers=workers)
    assert metrics["time/step_s"] == 2.0
    assert metrics["time/elapsed_s"] == 32.0
    assert metrics["rollout/tokens_per_s"] == 200.0
    assert metrics["rollout/trajectories_per_s"] == 20.0
    assert metrics["rollout/idle_fraction"] == 0.25
    assert metrics["sync/count"] == 3
    assert metrics["sync/pause_s"] == 0.25
    assert metrics["sync/canary_gap"] == 2e-6
    assert (metrics["replay/no_signal"], metrics["replay/damaged"], metrics["replay/uses_stale"]) == (5, 3, 12)
    assert (metrics["replay/held_groups"], metrics["replay/held_bytes"]) == (36, 3600)
    clock.now_s = 133.0
    metrics = meter.measure(step=1, wait_s=0.0, store=STORE, workers=[stats(1450, 6.5, 23.0)])
    assert (metrics["time/step_s"], metrics["rollout/tokens_per_s"]) == (1.0, 50.0)
    assert (metrics["rollout/idle_fraction"], metrics["sync/pause_s"]) == (1.0, None)


def test_a_step_like_any_other_alarms_nobody():
    alarms = Alarms(run_config())
    assert [alarms.look(GOOD) for _ in range(3)] == [[], [], []]


def test_discarded_optimiser_steps_are_told_when_they_begin_and_when_they_begin_again():
    alarms = Alarms(run_config())
    told = [alarms.look(metrics | {"step": i}) for i, metrics in enumerate([HALF_BAD, ALL_BAD, GOOD, HALF_BAD])]
    assert [len(sentences) for sentences in told] == [1, 0, 0, 1]
    assert told[0][0].startswith("learner step 0: 2 optimiser steps discarded, loss or gradient was not finite")
    assert told[3][0].startswith("learner step 3: 2 optimiser steps discarded")
    assert alarms.look(GOOD) == []
    assert alarms.look(HALF_BAD | {"learner/bad_steps": 1.0})[0].startswith(
        "learner step 0: 1 optimiser step discarded"
    )


def test_a_learner_that_moves_nothing_for_long_ends_the_run():
    alarms = Alarms(run_config(learner=LearnerConfig(max_bad_steps=3)))
    for metrics in [*[ALL_BAD] * 3, HALF_BAD, ALL_BAD, EMPTY, *[ALL_BAD] * 2]:
        alarms.look(metrics)
    sentence = r"last 4 learner steps, more than learner\.max_bad_steps=3 in a row.*--allow-change learner\.lr"
    with pytest.raises(RuntimeError, match=sentence):
        alarms.look(ALL_BAD)


def test_weights_are_sound_unless_the_last_step_was_discarded_as_a_whole():
    alarms, sound = Alarms(run_config()), []
    for metrics in (GOOD, ALL_BAD, EMPTY, HALF_BAD):
        alarms.look(metrics)
        sound.append(alarms.is_sound)
    assert sound == [True, False, False, True]


@pytest.mark.parametrize(
    ("before", "batch", "parts"),
    [
        (rewarded(0, 0), rewarded(0, 0), ["every reward is 0: the task is out of the policy's reach"]),
        (rewarded(0, 1, silent=0.2), rewarded(1, 1), ["every reward is 1, the highest so far: the task looks solved"]),
        (rewarded(-2, 0, silent=0.2), rewarded(0, 0), ["every reward is 0, the highest so far"]),
        (rewarded(-1, -1), rewarded(-1, -1), ["every reward is -1: the task is out of the policy's reach"]),
        (rewarded(0, 1, silent=0.2), rewarded(0, 1), ["the members of each group get the same reward"]),
        (rewarded(0, 1, silent=0.2), rewarded(0.5, 0.5), ["every reward is 0.5"]),
        (
            rewarded(0, 1, silent=0.2),
            rewarded(0, 0, entropy=0.003),
            ["every reward is 0: ", "collapsed: with an entropy of 0.003 nats per token"],
        ),
    ],
)
def test_a_policy_without_any_signal_is_told_once_with_the_reason_that_rewards_and_entropy_show(before, batch, parts):
    alarms = Alarms(run_config())
    assert alarms.look(before | {"train/zero_signal_fraction": 0.9}) == []
    course = [*[batch] * (COLLAPSE_STEPS - 1), batch | {"train/zero_signal_fraction": 0.9}, *[batch] * COLLAPSE_STEPS]
    told = [alarms.look(metrics) for metrics in [*course, *course]]
    assert [len(sentences) for sentences in told] == [0] * (len(course) - 1) + [1] + [0] * len(course)
    [sentence] = told[len(course) - 1]
    assert sentence.startswith("no group of the last 20 learner steps carries a signal")
    assert ("collapsed" in sentence) == (len(parts) == 2)
    for part in parts:
        assert part in sentence


def test_a_learner_that_waits_for_a_signal_which_never_comes_is_told_once():
    # 32 groups per step, half of them new ones: 16 · 20 = 320 groups in a row are as many as 20 steps would take
    waiting = Alarms(run_config(replay=ReplayConfig(skip_no_signal="all")))
    drawing = Alarms(run_config(replay=ReplayConfig(skip_no_signal="stale")))

    def store(groups: int, silent: int) -> dict:
        return STORE | {"groups": groups, "no_signal": silent, "unusable": {"unscored": 0}}

    course = [store(40, 5), store(360, 324), store(361, 324), store(680, 643), store(681, 644), store(700, 663)]
    assert [len(waiting.look_at(s)) for s in course] == [0, 0, 0, 0, 1, 0]
    assert [len(drawing.look_at(s)) for s in course] == [0] * 6


def test_a_majority_of_groups_without_verdicts_is_told_once_with_what_became_of_them():
    alarms = Alarms(run_config())

    def store(groups: int, unscored: int) -> dict:
        outcomes = {"scored": 8 * (groups - unscored), "truncated": 0, "error": 8 * unscored}
        return STORE | {"groups": groups, "unusable": {"unscored": unscored, "late": 0}, "outcomes": outcomes}

    assert alarms.look_at(store(UNSCORED_GROUPS - 1, UNSCORED_GROUPS - 1)) == []
    assert alarms.look_at(store(40, 20)) == []
    [sentence] = alarms.look_at(store(40, 21))
    assert sentence.startswith("21 of 40 groups have fewer verdicts than replay.min_verdicts")
    assert "(trajectories: 152 scored, 168 error)" in sentence
    assert alarms.look_at(store(80, 80)) == []
    assert outcomes_text({"outcomes": {"scored": 0}}) == "none"


def test_a_trouble_of_the_store_is_told_when_it_begins_and_when_it_is_over():
    alarms = Alarms(run_config())
    first, second = "shard-001 is full; make room", "shard-002 is full; make room"

    def look(*troubles: str) -> list[str]:
        return alarms.look_at(STORE | {"troubles": list(troubles)})

    assert look() == []
    assert look(first) == [first]
    assert look(first) == []
    assert look(first, second) == [second]
    assert look(second) == ["it is over: shard-001 is full"]
    assert look() == ["it is over: shard-002 is full"]
    assert look(first) == [first]


def test_a_stalled_run_ends_with_what_ails_the_store_and_who_waits_for_what():
    waits = [{"who": "learner", "what": "2 more groups", "since_s": 0.0}]
    store = STORE | {"troubles": ["shard-001 is full"], "waits": waits, "outcomes": {"scored": 4}}
    assert stall_text(store, step=7, limit_s=600.0) == (
        "no group to train on for 600 s at step 7: shard-001 is full; learner waits for 2 more groups; "
        "trajectories so far: 4 scored"
    )


def test_a_trouble_that_counts_its_seconds_is_the_same_one_all_along():
    alarms = Alarms(run_config())
    slow = [STORE | {"troubles": [f"shard-001: a write has taken {seconds} s so far"]} for seconds in (5, 10, 15)]
    assert [len(alarms.look_at(store)) for store in slow] == [1, 0, 0]
    assert alarms.look_at(STORE) == ["it is over: shard-001: a write has taken 15 s so far"]


def test_a_shard_that_is_away_is_spoken_of_by_the_one_who_starts_it_again():
    alarms = Alarms(run_config())
    away = STORE | {
        "shards": [{"shard": 0, "attached": False, "trouble": "shard 0 is gone"}],
        "troubles": ["shard 0 is gone", "the log's disk is full"],
    }
    assert alarms.look_at(away) == ["the log's disk is full"]


def test_a_multiplier_at_its_ceiling_is_told_once_after_a_while():
    alarms = Alarms(run_config(algorithm=AlgorithmConfig(delta=0.01, lambda_max=50.0)))
    high = GOOD | {"dual/saturated": 1.0}
    course = [*[high] * (SATURATED_STEPS - 1), GOOD, *[high] * SATURATED_STEPS, GOOD, *[high] * SATURATED_STEPS]
    told = [sentence for metrics in course for sentence in alarms.look(metrics)]
    assert len(told) == 1
    assert "ceiling 50 for 10 steps" in told[0]
    assert "δ=0.01 is infeasible" in told[0]
