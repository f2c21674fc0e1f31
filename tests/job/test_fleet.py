"""The fleet against workers in one event loop: who dies is replaced, and nothing of it is lost or kept."""

import asyncio
import re

import pytest

from r2vpo.job import fleet as fleet_module
from r2vpo.job.component import ComponentDied, FailedForGood, JobFailed, cancelled
from r2vpo.job.settings import ConfigError
from tests.job.fleet_fakes import Yard, until


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(fleet_module, "HEARTBEAT_S", 0.002)
    monkeypatch.setattr(fleet_module, "STATS_S", 0.02)


@pytest.fixture
async def yard(tmp_path):
    """Two workers that serve."""
    yard = Yard(tmp_path)
    keeping = await yard.start()
    yard.keeping = keeping
    yield yard
    await cancelled(keeping)


async def test_a_worker_that_dies_is_replaced_under_a_new_name_and_its_leases_go_back_at_once(yard):
    yard.launcher.actors["rollout-0"].die()
    await until(lambda: yard.serving() == ["rollout-2", "rollout-1"])
    assert yard.store.released == ["rollout-0"]
    assert yard.launcher.ended == ["rollout-0"]
    await until(lambda: len(yard.notes) == 2)
    assert yard.notes[0] == "rollout-0 died; replacing it (1 of 2 within 10 min)"
    assert re.fullmatch(r"rollout-2 serves, \d+ s after it was launched", yard.notes[1])
    [replaced, other] = yard.fleet.status()
    assert (replaced.restarts, other.restarts) == (1, 0)
    assert replaced.last_error.startswith("rollout-0 died")


async def test_a_worker_that_fails_is_asked_to_end_its_engine_before_it_is_ended(yard):
    yard.launcher.made["rollout-1"].fail(RuntimeError("vLLM's engine died"))
    await until(lambda: "rollout-2" in yard.serving())
    assert yard.launcher.actors["rollout-1"].calls[-1] == "stop"
    assert yard.launcher.ended == ["rollout-1"]


async def test_a_worker_that_fails_by_the_end_of_another_component_is_named_beside_it(yard):
    yard.launcher.made["rollout-1"].fail(ComponentDied("weight board died: killed; see x"))
    await until(lambda: "rollout-2" in yard.serving())
    assert yard.notes[0] == "weight board died; replacing rollout-1 (1 of 2 within 10 min)"


async def test_a_worker_that_hangs_is_ended_although_its_process_lives(tmp_path):
    yard = Yard(tmp_path, silent_s=0.05)
    keeping = await yard.start()
    yard.launcher.made["rollout-0"].silent = True
    await until(lambda: "rollout-2" in yard.serving())
    assert yard.launcher.ended == ["rollout-0"]
    assert "stop" not in yard.launcher.actors["rollout-0"].calls
    assert yard.notes[0].startswith("rollout-0 has not answered for 0.05 s; replacing it")
    await cancelled(keeping)


async def test_one_place_that_fails_too_often_ends_the_run_and_the_other_place_does_not_count(yard):
    for name in ("rollout-0", "rollout-1", "rollout-2"):
        yard.launcher.actors[name].die()
        await until(lambda gone=name: gone not in yard.serving() and len(yard.serving()) == 2)
    assert yard.serving() == ["rollout-4", "rollout-3"]
    yard.launcher.actors["rollout-4"].die()
    with pytest.raises(FailedForGood, match=r"^rollout worker 0 failed 3 times within 10 min, at last so: rollout-4"):
        await yard.keeping


async def test_what_a_worker_would_fail_with_again_ends_the_run_at_once(yard):
    yard.launcher.made["rollout-0"].fail(ValueError("no such reward"))
    with pytest.raises(FailedForGood, match="rollout-0 failed: no such reward"):
        await yard.keeping


async def test_a_worker_that_cannot_start_at_first_is_the_runs_error(tmp_path):
    yard = Yard(tmp_path)
    yard.launcher.prepare = lambda worker: setattr(worker, "start_error", RuntimeError("out of memory"))
    with pytest.raises(JobFailed, match=r"^rollout-[01] failed: out of memory"):
        await yard.fleet.start()


async def test_scaling_up_adds_workers_without_touching_the_others(yard):
    yard.fleet.scale(4)
    await yard.until_serving(4)
    assert yard.serving() == ["rollout-0", "rollout-1", "rollout-2", "rollout-3"]
    assert yard.launcher.ended == []


async def test_scaling_down_drains_the_newest(yard):
    yard.fleet.scale(1)
    await yard.until_serving(1)
    assert yard.serving() == ["rollout-0"]
    assert "drain" in yard.launcher.actors["rollout-1"].calls
    assert yard.store.released == ["rollout-1"]
    assert yard.notes == []


async def test_a_fleet_of_nobody_is_refused(yard):
    with pytest.raises(ConfigError, match="cannot scale to 0 rollout workers"):
        yard.fleet.scale(0)
    yard.fleet.drain("rollout-0")
    await yard.until_serving(1)
    with pytest.raises(ConfigError, match="rollout-1 is the only rollout worker: scale up first"):
        yard.fleet.drain("rollout-1")


async def test_draining_a_worker_lowers_the_target_and_it_is_not_replaced(yard):
    yard.fleet.scale(3)
    await yard.until_serving(3)
    assert yard.fleet.drain("rollout-1") == "rollout-1 finishes its groups and goes; 2 remain"
    await until(lambda: yard.serving() == ["rollout-0", "rollout-2"])
    assert yard.fleet.target == 2


async def test_draining_a_node_moves_its_workers_elsewhere(yard):
    assert yard.fleet.drain("here").startswith("rollout-0, rollout-1 leave node here")
    await until(lambda: yard.serving() == ["rollout-2", "rollout-3"])
    assert yard.launcher.excluded["rollout-2"] == frozenset({"n0"})
    assert yard.fleet.target == 2


async def test_draining_nobody_names_those_who_are_there(yard):
    with pytest.raises(
        ConfigError, match=r"no rollout worker or node is called mars; workers: rollout-0, rollout-1; nodes: here"
    ):
        yard.fleet.drain("mars")


async def test_an_added_worker_that_never_starts_is_given_up_and_the_run_goes_on(yard):
    yard.launcher.prepare = lambda worker: setattr(worker, "start_error", RuntimeError("no memory"))
    yard.fleet.scale(3)
    await until(lambda: yard.fleet.target == 2)
    await yard.until_serving(2)
    assert yard.notes[-1].startswith("rollout-4, which was added, does not start: rollout worker 2 failed 3 times")
    assert not yard.keeping.done()


async def test_a_worker_that_still_starts_is_let_go_at_once_when_it_is_wanted_no_more(yard):
    yard.launcher.prepare = lambda worker: worker.can_start.clear()
    yard.fleet.scale(3)
    await until(lambda: "rollout-2" in yard.launcher.made)
    yard.fleet.scale(2)
    await until(lambda: len(yard.fleet.status()) == 2)
    assert yard.launcher.ended == ["rollout-2"]


async def test_the_counts_of_a_worker_that_does_not_answer_are_those_last_heard(yard):
    async def tokens() -> dict[str, int]:
        return {stats.worker: stats.tokens for stats in await yard.fleet.stats()}

    assert await tokens() == {"rollout-0": 0, "rollout-1": 0}
    yard.launcher.made["rollout-0"].tokens = 5
    async with asyncio.timeout(5):
        while await tokens() != {"rollout-0": 5, "rollout-1": 0}:
            await asyncio.sleep(0.001)
    yard.launcher.made["rollout-0"].silent = True
    yard.launcher.made["rollout-0"].tokens = 7
    await asyncio.sleep(0.01)
    assert await tokens() == {"rollout-0": 5, "rollout-1": 0}


async def test_an_evaluation_goes_to_another_worker_when_the_first_one_fails(yard):
    yard.launcher.made["rollout-0"].evaluation_error = RuntimeError("vLLM's engine died")
    result = await yard.fleet.evaluate(version=4)
    assert (result.version, result.num_prompts) == (4, 16)
    assert "evaluate" in yard.launcher.actors["rollout-1"].calls
    assert yard.notes == [
        "rollout-0 failed: vLLM's engine died; see logs/error.log; evaluating again, on another worker"
    ]


async def test_a_fleet_that_must_stay_as_it_is_refuses_every_change_and_says_why(tmp_path):
    yard = Yard(tmp_path, fixed="weights are broadcast: use resume")
    keeping = await yard.start()
    for change in (lambda: yard.fleet.scale(3), lambda: yard.fleet.drain("rollout-1")):
        with pytest.raises(
            ConfigError, match=r"cannot (scale to 3|drain rollout-1).*: weights are broadcast: use resume"
        ):
            change()
    yard.launcher.made["rollout-1"].fail(RuntimeError("engine died"))
    with pytest.raises(FailedForGood, match=r"engine died; .*; weights are broadcast: use resume"):
        await keeping
    assert list(yard.launcher.made) == ["rollout-0", "rollout-1"]


async def test_pools_are_scaled_on_their_own_or_from_the_first_to_the_last(tmp_path):
    yard = Yard(tmp_path, pools={"own": 1, "rented": 2})
    keeping = await yard.start()

    def by_pool() -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for worker in yard.fleet.status():
            names.setdefault(worker.pool, []).append(worker.name)
        return names

    assert by_pool() == {"own": ["rollout-0"], "rented": ["rollout-1", "rollout-2"]}
    yard.fleet.scale(3, pool="rented")
    await yard.until_serving(4)
    assert by_pool()["rented"] == ["rollout-1", "rollout-2", "rollout-3"]
    yard.fleet.scale(5)  # one more than there are: in the first pool
    await yard.until_serving(5)
    assert by_pool()["own"] == ["rollout-0", "rollout-4"]
    yard.fleet.scale(1)  # four fewer: three rented ones, then one of the first pool
    await yard.until_serving(1)
    assert by_pool() == {"own": ["rollout-0"]}
    with pytest.raises(ConfigError, match="cannot scale to 0 rollout workers"):
        yard.fleet.scale(0, pool="own")
    await cancelled(keeping)


async def test_draining_a_worker_of_a_pool_that_was_just_emptied_leaves_the_other_pools_alone(tmp_path):
    yard = Yard(tmp_path, pools={"own": 2, "rented": 1})
    keeping = await yard.start()
    yard.fleet.scale(0, pool="rented")
    yard.fleet.drain("rollout-2")  # before the fleet has let it go
    assert yard.fleet.target == 2
    await yard.until_serving(2)
    assert yard.serving() == ["rollout-0", "rollout-1"]
    await cancelled(keeping)


async def test_a_pool_that_is_none_is_refused_with_those_there_are(tmp_path):
    yard = Yard(tmp_path, pools={"own": 1, "rented": 1})
    with pytest.raises(ConfigError, match="no pool is called spot; there are own, rented"):
        yard.fleet.scale(3, pool="spot")
    with pytest.raises(ConfigError, match=r"no pool is called spot; there are none: the run has no rollout\.pools"):
        Yard(tmp_path).fleet.scale(3, pool="spot")


async def test_workers_on_machines_that_come_and_go_die_as_often_as_they_like(tmp_path):
    yard = Yard(tmp_path, pools={"own": 1, "rented": 1}, spot=("rented",), max_restarts=1)
    keeping = await yard.start()
    for dead in ("rollout-1", "rollout-2", "rollout-3"):
        yard.launcher.actors[dead].die()
        await until(lambda dead=dead: dead not in yard.serving() and len(yard.serving()) == 2)
    assert yard.serving() == ["rollout-0", "rollout-4"]
    assert [worker.pool for worker in yard.fleet.status()] == ["own", "rented"]
    assert yard.notes[0] == "rollout-1 died; replacing it: machines of its pool come and go"
    await cancelled(keeping)
