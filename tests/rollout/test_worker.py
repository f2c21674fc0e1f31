"""The worker's loop against fakes in one event loop: nothing here starts a process."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from contextlib import asynccontextmanager
from itertools import pairwise

import numpy as np
import pytest

from r2vpo.records import NO_VERSION, Outcome
from rollout.delivery import FileDelivery, WeightSyncFailed
from rollout.generation import EngineFailed, request_seed
from rollout.rewards import Verdict
from rollout.tasks.base import TaskPrompt
from rollout.worker import BusyClock
from tests.rollout.worker_fakes import World, settle, until


@pytest.fixture
async def world():
    world = World()
    yield world
    world.worker.stop()
    await asyncio.wait([world.run], timeout=5)
    assert world.run.done()
    world.run.exception()  # a test that is about it has looked at it


async def test_a_lease_becomes_a_group_with_every_array_in_its_place(world):
    await world.start(3, version=4)
    await until(lambda: world.store.groups)
    [group] = world.store.groups
    assert (group.key, group.prompt, group.truth, group.worker, group.lease_version) == ("0.3", "3", 30, "rollout-0", 4)
    first, second = group.trajectories
    assert first.token_ids_T.tolist() == [3, 9, 50, 60]
    assert second.token_ids_T.tolist() == [3, 9, 50, 61]
    assert first.loss_mask_T.tolist() == [False, False, True, True]
    assert first.behavior_logprob_T.tolist() == [0.0, 0.0, -0.5, -0.25]
    assert first.version_T.tolist() == [NO_VERSION, NO_VERSION, 4, 4]
    assert [t.dtype for t in (first.token_ids_T, first.behavior_logprob_T, first.version_T)] == ["i4", "f4", "i4"]
    assert (first.outcome, first.reward, first.response) == (Outcome.SCORED, 1.0, "answer 0")
    assert (second.outcome, second.reward) == (Outcome.TRUNCATED, 0.0)
    assert world.rewards.items == [("answer 0", 30), ("answer 1", 30)]
    assert world.engine.requests == [
        {"prompt": [3, 9], "n": 2, "seed": request_seed(7, "0.3"), "temperature": 0.5, "max_tokens": 4}
    ]


async def test_a_cut_response_that_could_not_be_judged_keeps_the_outcome_of_its_verdict(world):
    world.rewards.verdicts = [Verdict(outcome=Outcome.NO_VERDICT), Verdict(outcome=Outcome.TIMEOUT, error="slow")]
    await world.start(3)
    await until(lambda: world.store.groups)
    [group] = world.store.groups
    assert [t.outcome for t in group.trajectories] == [Outcome.NO_VERDICT, Outcome.TIMEOUT]
    assert [t.reward for t in group.trajectories] == [None, None]


async def test_why_there_is_no_reward_is_written_down_once_per_reason(world, caplog):
    timeout, error = Verdict(outcome=Outcome.TIMEOUT, error="slow"), Verdict(outcome=Outcome.ERROR, error="KeyError: 1")
    world.rewards.verdicts = [timeout, error]
    await world.start(3, 4)
    await until(lambda: len(world.store.groups) == 2)
    assert caplog.messages == ["no reward (timeout): slow", "no reward (error): KeyError: 1"]


async def test_every_acknowledged_key_is_said_for_whoever_listens(world, caplog):
    caplog.set_level(logging.DEBUG, logger="rollout.worker")
    await world.start(3, 4)
    await until(lambda: len(caplog.messages) == 2)
    assert sorted(caplog.messages) == ["acknowledged 0.3", "acknowledged 0.4"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
async def test_a_log_prob_that_is_no_finite_number_is_an_error_whatever_the_verdict(world, caplog, number):
    world.engine.logprobs[1] = number
    await world.start(3)
    await until(lambda: world.store.groups)
    [group] = world.store.groups
    assert [(t.outcome, t.reward) for t in group.trajectories] == [(Outcome.ERROR, None)] * 2
    assert caplog.messages == ["no reward (error): the engine reported a log-prob that is not a finite number"]
    assert not group.has_signal


async def test_before_the_first_verified_weights_nothing_is_asked_for(world):
    await world.store.grant(1)
    await settle()
    assert world.store.asks == []
    assert world.worker.stats().waits_for == "the first weights"
    assert world.worker.stats().version == NO_VERSION
    await world.weights.publish(0)
    await until(lambda: world.store.groups)
    assert world.store.asks[0] == (0, 2)


async def test_no_more_groups_are_in_flight_than_configured_and_a_finished_one_makes_room(world):
    world.engine.gate.clear()
    await world.start(1, 2, 3)
    await until(lambda: len(world.engine.requests) == 2)
    await settle()
    assert len(world.engine.requests) == 2
    assert world.store.asks == [(0, 2)]
    assert world.worker.stats().in_flight == 2
    world.engine.gate.set()
    await until(lambda: len(world.store.groups) == 3)
    assert [group.key for group in world.store.groups] == ["0.1", "0.2", "0.3"]
    await until(lambda: world.store.asks[-1] == (0, 2))
    assert world.worker.stats().in_flight == 0


async def test_the_counts_are_of_new_groups_and_each_sync_is_told_once(world):
    world.store.known = {"0.2"}
    await world.start(1, 2)
    await until(lambda: len(world.store.groups) == 2 and not world.worker.stats().in_flight)
    stats = world.worker.stats()
    assert (stats.groups, stats.trajectories, stats.tokens, stats.version) == (1, 2, 4, 0)
    assert 0 < stats.busy_s < stats.alive_s


async def test_a_sync_is_reported_once_with_its_gap(world):
    world.engine.gaps = [5e-5]
    await world.start()
    await until(lambda: world.store.asks)
    [record] = world.worker.stats().new_syncs
    assert (record.worker, record.version) == ("rollout-0", 0)
    assert record.canary_gap == pytest.approx(5e-5, rel=0.01)
    assert record.fetch_s > 0
    assert record.pause_s > 0
    assert world.worker.stats().new_syncs == ()


async def test_stop_returns_the_leases_in_flight_and_appends_nothing(world):
    world.engine.gate.clear()
    await world.start(1, 2)
    await until(lambda: len(world.engine.requests) == 2)
    world.worker.stop()
    await world.ended()
    assert sorted(world.store.released) == ["0.1", "0.2"]
    assert world.store.groups == []
    assert world.worker.stats().waits_for == "nothing: it has stopped"


async def test_a_drained_worker_finishes_its_groups_takes_no_more_and_ends(world):
    world.engine.gate.clear()
    await world.start(1)
    await until(lambda: len(world.engine.requests) == 1)
    world.worker.drain()
    await settle()
    await world.store.grant(2)
    await settle()
    assert not world.run.done()
    assert world.worker.stats().waits_for == "the end of its last groups"
    world.engine.gate.set()
    await world.ended()
    assert [group.key for group in world.store.groups] == ["0.1"]
    assert world.store.released == []


async def test_an_idle_worker_that_is_drained_ends_at_once(world):
    await world.start()
    await until(lambda: world.store.asks)
    world.worker.drain()
    await world.ended()


async def test_an_engine_that_generates_no_token_ends_the_worker_although_its_processes_live(world):
    world.engine.gate.clear()
    await world.start(1)
    await until(lambda: len(world.engine.probes) >= 2)
    assert set(world.engine.probes) == {5.0}
    assert not world.run.done()
    world.engine.is_wedged = True
    with pytest.raises(EngineFailed, match="no token for 5 s"):
        await world.ended()
    assert world.store.released == ["0.1"]


async def test_an_engine_that_is_stopped_in_the_middle_of_a_load_ends_the_worker_though_it_never_resumes(
    world, monkeypatch
):
    @asynccontextmanager
    async def paused():
        try:
            yield
        finally:
            await asyncio.Event().wait()  # the answer to "resume"

    async def load(updates, *, version):
        await asyncio.Event().wait()

    monkeypatch.setattr("rollout.worker.LET_GO_S", 0.01)
    world.engine.gate.clear()
    await world.start(1)
    await until(lambda: len(world.engine.requests) == 1)
    world.engine.paused, world.engine.load = paused, load
    await world.weights.publish(1)
    await settle()
    world.engine.is_wedged = True
    with pytest.raises(EngineFailed, match="no token for 5 s"):
        await world.ended()
    assert world.store.released == ["0.1"]


async def test_a_learner_that_went_back_makes_the_worker_drop_what_it_sampled_and_take_the_older_version(world):
    world.engine.gate.clear()
    await world.start(1, version=7)
    await until(lambda: len(world.engine.requests) == 1)
    await world.weights.publish(5, lineage=1)
    await until(lambda: world.worker.stats().version == 5)
    assert world.store.released == ["0.1"]
    assert world.store.groups == []
    await world.weights.publish(6, lineage=1)
    await until(lambda: world.worker.stats().version == 6)
    assert [version for version, _ in world.engine.loads] == [7, 5, 6]


async def test_what_fails_while_the_worker_is_stopped_is_no_failure(world):
    broken = asyncio.Event()

    async def newest(**_):
        await broken.wait()
        raise ConnectionError("the learner has gone too")

    world.weights.newest = newest
    await world.start()
    await until(lambda: world.store.asks)
    await settle()
    broken.set()
    world.worker.stop()
    await world.ended()


async def test_a_dead_engine_ends_the_worker_and_all_leases_go_back(world):
    async def generate(prompt_token_ids, **settings):
        world.engine.requests.append(settings)
        await (world.engine.gate if prompt_token_ids == [1, 9] else asyncio.Event()).wait()
        raise EngineFailed("killed")

    world.engine.generate = generate
    world.engine.gate.clear()
    await world.start(1, 2)
    await until(lambda: len(world.engine.requests) == 2)
    world.engine.gate.set()
    with pytest.raises(EngineFailed, match="killed"):
        await world.ended()
    assert sorted(world.store.released) == ["0.1", "0.2"]
    assert world.store.groups == []


async def test_an_engine_that_dies_at_rest_ends_the_worker_too(world):
    await world.start()
    await until(lambda: world.worker.stats().version == 0)
    world.engine.dead.set()
    with pytest.raises(EngineFailed):
        await world.ended()


async def test_a_store_that_refuses_a_group_ends_the_worker_and_its_lease_goes_back(world):
    world.store.append_error = OSError("disk full")
    await world.start(1)
    with pytest.raises(OSError, match="disk full"):
        await world.ended()
    assert world.store.released == ["0.1"]
    assert world.worker.stats().groups == 0


@pytest.mark.parametrize("source", ["lease", "newest"])
async def test_a_source_that_fails_ends_the_worker(world, source):
    async def fail(**_):
        raise ConnectionError(f"no {source}")

    setattr(world.store if source == "lease" else world.weights, source, fail)
    await world.start()
    with pytest.raises(ConnectionError, match=f"no {source}"):
        await world.ended()


async def test_a_prompt_that_the_engine_refuses_becomes_a_group_of_errors_and_the_next_goes_on(world):
    world.engine.error = ValueError("prompt too long")
    await world.start(1)
    await until(lambda: world.store.groups)
    [group] = world.store.groups
    assert [t.outcome for t in group.trajectories] == [Outcome.ERROR, Outcome.ERROR]
    assert [t.reward for t in group.trajectories] == [None, None]
    assert group.trajectories[0].token_ids_T.tolist() == [1, 9]
    assert group.trajectories[0].num_trained_tokens == 0
    assert group.trajectories[0].response == "prompt too long"
    world.engine.error = None
    await world.store.grant(2)
    await until(lambda: len(world.store.groups) == 2)
    assert world.store.groups[1].num_scored == 2


async def test_new_weights_are_asked_under_at_once_while_an_old_ask_still_waits(world):
    await world.start()
    await until(lambda: world.store.asks == [(0, 2)])
    await world.weights.publish(1)
    await until(lambda: world.store.asks == [(0, 2), (1, 2)])
    await settle()
    assert len(world.store.asks) == 2  # and only once


async def test_two_asks_that_are_both_granted_are_worked_off_before_the_next(world):
    world.engine.gate.clear()
    await world.start()
    await until(lambda: world.store.asks == [(0, 2)])
    await world.weights.publish(1)
    await until(lambda: len(world.store.asks) == 2)
    await world.store.grant(1, 2, 3, 4)
    await until(lambda: world.worker.stats().in_flight == 4)
    await settle()
    assert world.store.asks == [(0, 2), (1, 2)]
    world.engine.gate.set()
    await until(lambda: len(world.store.groups) == 4)
    assert [group.lease_version for group in world.store.groups] == [0, 0, 1, 1]


async def test_one_ask_per_version_waits_at_a_time(world):
    world.engine.gate.clear()
    await world.start(1)
    await until(lambda: world.store.asks == [(0, 2), (0, 1)])
    world.engine.gate.set()
    await until(lambda: world.store.groups)
    await settle()
    assert world.store.asks == [(0, 2), (0, 1)]
    assert world.worker.stats().waits_for == "the limiter"


async def test_an_exhausted_job_is_not_asked_again_and_again_and_weights_still_come(world):
    world.store.exhausted = True
    await world.start()
    await until(lambda: world.store.asks)
    await settle()
    assert world.store.asks == [(0, 2)]
    assert "no further prompt" in world.worker.stats().waits_for
    await world.weights.publish(1)
    await until(lambda: world.worker.stats().version == 1)
    assert not world.run.done()


async def test_a_superseded_version_is_skipped(world):
    world.weights.superseded = {0, 1}
    await world.start()
    await until(lambda: world.worker.stats().version == 2)
    assert world.engine.loads == [(2, [b"2"])]


async def test_a_worker_that_is_slow_to_load_skips_to_the_newest_version(world):
    world.engine.canary_gate.clear()
    await world.start(version=0)
    await until(lambda: world.engine.version == 0 and world.engine.loads)
    for version in (1, 2, 3):
        await world.weights.publish(version)
    world.engine.canary_gate.set()
    await until(lambda: world.worker.stats().version == 3)
    assert [version for version, _ in world.engine.loads] == [0, 3]


async def test_between_load_and_canary_nothing_is_leased_or_appended(world):
    world.engine.gate.clear()
    await world.start(1)
    await until(lambda: world.engine.requests)
    world.engine.canary_gate.clear()
    await world.weights.publish(1)
    await until(lambda: world.engine.version == 1)
    world.engine.gate.set()
    num_asks = len(world.store.asks)
    await settle()
    assert world.store.groups == []
    assert len(world.store.asks) == num_asks
    assert world.worker.stats().version == 0
    world.engine.canary_gate.set()
    await until(lambda: world.store.groups)
    assert world.worker.stats().version == 1
    assert world.store.released == []


async def test_a_lease_that_arrives_between_load_and_canary_waits_until_the_weights_are_proven(world):
    await world.start()
    await until(lambda: world.store.asks)
    world.engine.canary_gate.clear()
    world.engine.gaps = [0.5, 0.0]
    await world.weights.publish(1)
    await until(lambda: world.engine.version == 1)
    await world.store.grant(1)  # the answer to the question of before the load
    await until(lambda: world.worker.stats().in_flight == 1)
    await settle()
    assert world.engine.requests == []
    world.engine.canary_gate.set()  # fails once: what the unproven weights could have begun is discarded
    await until(lambda: world.worker.stats().version == 1)
    assert world.store.released == ["0.1"]
    assert world.engine.requests == []


async def test_weights_on_their_way_are_files_for_other_processes_that_vanish_by_themselves(world):
    seen = []
    load = world.engine.load

    async def look_and_load(updates, *, version):
        paths = [update["path"] for update in updates]
        seen.extend((path, subprocess.run(["cat", path], capture_output=True).stdout) for path in paths)
        await load(updates, version=version)

    world.engine.load = look_and_load
    await world.start(version=5)
    await until(lambda: world.worker.stats().version == 5)
    [(path, payload)] = seen
    assert payload == b"5"
    assert not os.path.exists(path)


async def test_a_failing_canary_discards_the_groups_in_flight_and_loads_again(world):
    world.engine.gate.clear()
    await world.start(1, 2)
    await until(lambda: len(world.engine.requests) == 2)
    world.engine.gaps = [0.5, 0.0]
    await world.weights.publish(1)
    await until(lambda: world.worker.stats().version == 1)
    assert sorted(world.store.released) == ["0.1", "0.2"]
    assert [version for version, _ in world.engine.loads] == [0, 1, 1]
    world.engine.gate.set()
    await settle()
    assert world.store.groups == []
    await world.store.grant(3)
    await until(lambda: world.store.groups)
    assert world.store.groups[0].key == "0.3"
    assert world.store.groups[0].oldest_version == 1


@pytest.mark.parametrize("gap", [0.5, float("nan")])
async def test_a_canary_that_fails_every_time_ends_the_worker(world, gap):
    world.engine.gaps = [0.0] + [gap] * FileDelivery.max_tries
    world.engine.gate.clear()
    await world.start(1)
    await until(lambda: world.engine.requests)
    await world.weights.publish(1)
    with pytest.raises(WeightSyncFailed, match=r"rollout-0: after loading version 1 3 times.*allowed are 0\.0001"):
        await world.ended()
    assert len(world.engine.loads) == 1 + FileDelivery.max_tries
    assert world.store.released == ["0.1"]
    assert world.store.groups == []


async def test_a_damaged_bucket_ends_the_worker_before_anything_is_loaded(world):
    world.weights.damaged = True
    await world.start()
    with pytest.raises(WeightSyncFailed, match="version 0: the bucket that starts with w has checksum"):
        await world.ended()
    assert world.engine.loads == []


async def test_an_evaluation_waits_for_its_version_and_takes_the_mean_of_verdicts(world):
    await world.start()
    await until(lambda: world.worker.stats().version == 0)
    evaluation = asyncio.create_task(world.worker.evaluate(version=1, num_prompts=10, timeout_s=5))
    await settle()
    assert world.engine.requests == []
    verdicts = iter(
        [(1.0, "scored"), (0.0, "scored"), (None, "timeout"), (1.0, "scored"), (1.0, "scored"), (1.0, "scored")]
    )

    async def score(items):
        reward, outcome = next(verdicts)
        return [Verdict(outcome=Outcome(outcome), reward=reward)]

    world.rewards.score = score
    await world.weights.publish(1)
    result = await evaluation
    assert (result.version, result.accuracy, result.greedy_accuracy, result.num_prompts) == (1, 0.5, 1.0, 2)
    assert [r["temperature"] for r in world.engine.requests] == [0.5] * 3 + [0.0] * 3
    assert {r["n"] for r in world.engine.requests} == {1}
    assert [r["seed"] for r in world.engine.requests[:2]] == [request_seed(7, "eval.0"), request_seed(7, "eval.1")]


async def test_an_evaluation_scores_every_further_set_of_the_task_by_itself(world):
    amc, aime = [TaskPrompt(text="e8", truth=1)], [TaskPrompt(text="e7", truth=0), TaskPrompt(text="e6", truth=0)]
    world.worker._task.eval_sets = {"amc": amc, "aime": aime}

    async def score(items):
        return [Verdict(outcome=Outcome.SCORED, reward=float(truth == 1)) for _, truth in items]

    world.rewards.score = score
    await world.start()
    result = await world.worker.evaluate(version=0, num_prompts=1, timeout_s=5)
    assert result.num_prompts == 1
    assert {name: (s.accuracy, s.greedy_accuracy, s.num_prompts) for name, s in result.sets.items()} == {
        "amc": (1.0, 1.0, 1),
        "aime": (0.0, 0.0, 2),
    }
    seeds = {tuple(r["prompt"]): r["seed"] for r in world.engine.requests}
    assert seeds[(6, 9)] == request_seed(7, "eval.aime.1")


async def test_an_evaluation_leaves_out_what_the_engine_refuses(world):
    await world.start()
    await until(lambda: world.worker.stats().version == 0)
    world.engine.error = ValueError("prompt too long")
    result = await world.worker.evaluate(version=0, num_prompts=2, timeout_s=5)
    assert result.num_prompts == 0
    assert np.isnan(result.accuracy)


async def test_an_evaluation_whose_version_does_not_come_times_out(world):
    await world.start()
    await until(lambda: world.worker.stats().version == 0)
    late = r"version 1 of the weights did not arrive within 0\.01 s; rollout-0 holds version 0"
    with pytest.raises(TimeoutError, match=late):
        await world.worker.evaluate(version=1, num_prompts=1, timeout_s=0.01)


def test_the_busy_clock_adds_the_spans_with_work_in_flight():
    now_s = 100.0
    clock = BusyClock(lambda: now_s)
    assert clock.read() == (0.0, 0.0)
    clock.start()
    now_s = 103.0
    clock.set_busy(True)
    now_s = 104.0
    clock.set_busy(True)  # busy already: the span goes on
    clock.start()  # started already
    now_s = 105.0
    assert clock.read() == (2.0, 5.0)
    clock.set_busy(False)
    clock.set_busy(False)
    now_s = 110.0
    assert clock.read() == (2.0, 10.0)
    clock.set_busy(True)
    now_s = 110.5
    assert clock.read() == (2.5, 10.5)


def test_request_seeds_are_stable_and_spread_and_leave_room_for_the_members():
    assert request_seed(0, "0.1") == request_seed(0, "0.1")
    seeds = [request_seed(run, f"0.{index}") for run in (0, 1) for index in range(500)]
    assert len(set(seeds)) == 1000
    assert all(0 <= seed < 1 << 62 for seed in seeds)
    # Members use seed, seed + 1, …: neighbouring prompts must not share them.
    ordered = sorted(seeds)
    assert min(b - a for a, b in pairwise(ordered)) > 10_000
