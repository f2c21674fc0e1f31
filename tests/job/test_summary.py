import json
import math

import pytest

from r2vpo.job.summary import earlier_evaluations, evaluation_metrics, summarise
from r2vpo.records import Evaluation, SyncRecord


def sync(version: int, pause_s: float, gap: float) -> SyncRecord:
    return SyncRecord(worker="r0", version=version, fetch_s=0.0, pause_s=pause_s, canary_gap=gap)


STORE = {
    "version": 2,
    "groups": 10,
    "trajectories": 80,
    "sampled_tokens": 1200,
    "outcomes": {"scored": 78, "truncated": 2, "no_verdict": 0, "timeout": 0, "error": 0},
    "fresh_waiting": 3,
    "uses": {"fresh": 8, "stale": 4},
    "no_signal": 1,
    "unusable": {"unscored": 1, "late": 0, "ahead": 0, "damaged": 2},
    "held_bytes": 4096,
    "shards": [{"shard": 0}, {"shard": 1}],
}
STEPS = [
    {
        "step": 0,
        "train/tokens": 100,
        "train/stale_tokens": 0,
        "train/lag_mean": 0.0,
        "train/lag_max": 0,
        "dual/lambda": 0.5,
        "dual/second_moment": 0.01,
        "dual/second_moment_max": 0.02,
        "time/step_s": 1.0,
        "time/wait_s": 0.5,
        "rollout/idle_fraction": 0.0,
    },
    {
        "step": 1,
        "train/tokens": 300,
        "train/stale_tokens": 100,
        "train/lag_mean": 2.0,
        "train/lag_max": 5,
        "dual/lambda": 0.6,
        "dual/second_moment": 0.03,
        "dual/second_moment_max": None,
        "time/step_s": 3.0,
        "time/wait_s": 0.5,
        "rollout/idle_fraction": 0.4,
    },
]


def test_the_summary_redone_by_hand(config):
    before = Evaluation(version=0, accuracy=0.4, greedy_accuracy=0.5, num_prompts=512)
    after = Evaluation(version=2, accuracy=0.7, greedy_accuracy=0.8, num_prompts=511)
    summary = summarise(
        config,
        steps=STEPS,
        status="finished",
        wall_s=9.0,
        evaluations={"before": before, "after": after},
        store=STORE,
        # the load of version 0 pauses nothing that matters, but its canary counts
        restarts={"rollout": 2},
        syncs=[sync(0, 9.0, 5e-6), sync(1, 0.02, 1e-6), sync(2, 0.04, 2e-6)],
    )
    assert summary == {
        "run": "toy",
        "status": "finished",
        "steps": 2,
        "version": 2,
        "wall_s": 9.0,
        "algorithm": "r2vpo",
        "eval": {
            "before": {"accuracy": 0.4, "greedy": 0.5, "num_prompts": 512},
            "after": {"accuracy": 0.7, "greedy": 0.8, "num_prompts": 511},
        },
        "rollouts": {"groups": 10, "trajectories": 80, "tokens": 1200},
        "replay": {
            "stale_fraction_trained": 100 / 400,
            "shards": 2,
            "uses": {"fresh": 8, "stale": 4},
            "no_signal": 1,
            "damaged": 2,
            "held_bytes": 4096,
        },
        "lag": {"mean": (0 * 100 + 2 * 300) / 400, "max": 5},
        "sync": {"count": 2, "pause_s_p50": 0.03, "pause_s_max": 0.04, "canary_gap_max": 5e-6},
        "dual": {"lambda": 0.6, "second_moment": 0.02, "second_moment_max": 0.02},
        "outcomes": STORE["outcomes"],
        "restarts": {"rollout": 2, "learner": 0, "shard": 0, "job": 0},
        "throughput": {"trajectories_per_s": 80 / 4, "tokens_per_s": 1200 / 4},
        "learner": {"idle_fraction": (0.5 + 0.5) / 4},
        "rollout": {"idle_fraction": pytest.approx((0.0 * 1 + 0.4 * 3) / 4)},
    }


def test_a_run_that_ended_before_its_first_step_has_a_summary(config):
    store = {"version": 0, "groups": 0, "trajectories": 0, "sampled_tokens": 0, "outcomes": {}}
    nothing = Evaluation(version=0, accuracy=math.nan, greedy_accuracy=math.nan, num_prompts=0)
    summary = summarise(
        config,
        steps=[],
        status="failed",
        wall_s=1.0,
        evaluations={"before": nothing},
        store=store,
        restarts={"rollout": 2},
        syncs=[sync(0, 0.1, math.inf)],
    )
    json.dumps(summary, allow_nan=False)
    assert summary["steps"] == 0
    assert summary["eval"]["before"]["accuracy"] is None
    assert summary["sync"] == {"count": 0, "pause_s_p50": None, "pause_s_max": None, "canary_gap_max": None}
    assert summary["dual"]["lambda"] is None
    assert set(summary["replay"].values()) == {None}
    assert summary["throughput"]["tokens_per_s"] is None


def test_the_first_evaluation_of_a_run_is_read_back_from_its_summary(config, tmp_path):
    path = tmp_path / "summary.json"
    assert earlier_evaluations(path) == {}
    for evaluations in ({}, {"before": Evaluation(version=0, accuracy=0.4, greedy_accuracy=0.5, num_prompts=64)}):
        summary = summarise(
            config, steps=[], status="running", wall_s=0.0, evaluations=evaluations, store=STORE, syncs=[], restarts={}
        )
        path.write_text(json.dumps(summary))
        assert earlier_evaluations(path) == evaluations


def test_further_sets_stand_in_the_summary_and_in_the_metrics_under_their_names(config, tmp_path):
    amc = Evaluation(version=0, accuracy=0.25, greedy_accuracy=math.nan, num_prompts=40)
    before = Evaluation(version=0, accuracy=0.5, greedy_accuracy=0.75, num_prompts=64, sets={"amc": amc})
    summary = summarise(
        config,
        steps=[],
        status="running",
        wall_s=0.0,
        evaluations={"before": before},
        store=STORE,
        syncs=[],
        restarts={"rollout": 2},
    )
    assert summary["eval"]["before"]["sets"] == {"amc": {"accuracy": 0.25, "greedy": None, "num_prompts": 40}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    read = earlier_evaluations(tmp_path / "summary.json")["before"].sets["amc"]
    assert (read.accuracy, read.num_prompts) == (0.25, 40)
    assert math.isnan(read.greedy_accuracy)
    metrics = evaluation_metrics(before)
    assert metrics.pop("eval/amc/greedy_accuracy") is amc.greedy_accuracy
    assert metrics == {"eval/accuracy": 0.5, "eval/greedy_accuracy": 0.75, "eval/amc/accuracy": 0.25}
