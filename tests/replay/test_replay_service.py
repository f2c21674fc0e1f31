import asyncio
import random
import threading

import pytest

from r2vpo.records import Kind
from replay.config import ReplayConfig
from replay.consumption import ConsumptionLog
from replay.errors import DiskFull, ReplayError
from replay.local import LocalStore
from replay.reader import StoreReader
from replay.serialize import encode
from replay.shard import ShardStore
from tests.replay.replay_groups import make_group, same, unscored_group

SOON = 0.02
"""Seconds of a wait that is expected to end without result."""
LONG = 60.0
"""Seconds of a wait that is expected to be ended by something else."""


@pytest.fixture
async def start(tmp_path):
    """Starts services on one directory; whatever is open at the end is closed."""
    started = []

    async def start(*, groups_per_step=2, steps=10, resume_step=None, num_prompts=50, seed=0, **config):
        settings = ReplayConfig(**{"max_lag": 1, "stale_fraction": 0.0, **config})
        service = LocalStore(
            tmp_path,
            config=settings,
            num_prompts=num_prompts,
            groups_per_step=groups_per_step,
            steps=steps,
            seed=seed,
            resume_step=resume_step,
        )
        started.append(service)
        await service.open()
        return service

    yield start
    for service in started:
        await service.close()


async def lease(service, *, version=0, lineage=0, count=1, worker="r0", timeout_s=SOON):
    return await service.lease(worker=worker, stamp=(lineage, version), count=count, timeout_s=timeout_s)


async def answer(service, *, version=0, count=1, worker="r0"):
    """Lease and append ``count`` groups; returns their keys."""
    leases = (await lease(service, version=version, count=count, worker=worker)).leases
    assert len(leases) == count
    assert all(await asyncio.gather(*(service.append(make_group(x.key, version=version)) for x in leases)))
    return [x.key for x in leases]


async def train(service, step):
    batch = await service.sample(step=step, timeout_s=SOON)
    await service.commit(step=step, group_ids=batch.group_ids)
    return batch


async def waits_of(service, who):
    """What ``who`` waits for, once it does."""
    while not (found := [w["what"] for w in (await service.stats())["waits"] if w["who"] == who]):
        await asyncio.sleep(0)
    return found[0]


async def test_a_waiting_sample_is_woken_by_the_append_that_completes_it(start):
    service = await start()
    leases = (await lease(service, count=2)).leases
    await service.append(make_group(leases[0].key))
    waiting = asyncio.create_task(service.sample(step=0, timeout_s=LONG))
    assert await waits_of(service, "learner") == (
        f"step 0 has 1 of 2 fresh groups, 1 prompts are in flight: {leases[1].key} (r0)"
    )
    await service.append(make_group(leases[1].key))
    batch = await waiting
    assert [g.group.key for g in batch.groups] == [x.key for x in leases]
    assert (await service.stats())["waits"] == []


async def test_a_sample_that_stays_incomplete_ends_with_nothing(start):
    service = await start()
    assert await service.sample(step=0, timeout_s=SOON) is None
    await answer(service, count=2)
    assert await service.sample(step=0, timeout_s=0.0) is not None


async def test_a_lease_that_is_not_granted_ends_with_a_sentence(start):
    service = await start(max_lag=0)
    first = await lease(service, count=5)
    assert (len(first.leases), first.exhausted) == (2, False)
    assert "more of version 0 would exceed max_lag=0" in first.reason
    assert (await lease(service, count=1)).leases == ()
    second = asyncio.create_task(lease(service, worker="r1", timeout_s=LONG))
    assert "2 prompts are in flight" in await waits_of(service, "r1")
    await service.release(worker="r0", keys=(first.leases[1].key,))
    assert [x.key for x in (await second).leases] == [first.leases[1].key]


async def test_all_that_was_asked_for_needs_no_reason(start):
    assert (await lease(await start(), count=2)).reason == ""


async def test_an_expired_lease_is_leased_again_and_its_late_answer_counts_once(start):
    service = await start(lease_s=0.01, max_lag=0)
    first = await lease(service, count=2)
    second = await lease(service, count=2, worker="r1", timeout_s=LONG)
    assert {x.key for x in second.leases} == {x.key for x in first.leases}
    late = make_group(first.leases[0].key, worker="r0")
    assert await service.append(late)
    assert not await service.append(make_group(first.leases[0].key, worker="r1"))
    assert same((await service.read([1]))[1], late)


async def test_a_waiting_learner_is_woken_when_the_lease_it_waits_for_expires(start):
    service = await start(groups_per_step=1, lease_s=0.05)
    await answer(service)
    await train(service, 0)
    await lease(service, version=0)  # due at step 1
    late = (await lease(service, version=1, worker="r1")).leases[0]
    await service.append(make_group(late.key, version=1))
    assert await service.sample(step=1, timeout_s=0.0) is None
    batch = await service.sample(step=1, timeout_s=LONG)
    assert [g.group.key for g in batch.groups] == [late.key]


async def test_the_learner_goes_before_a_new_lease_that_would_make_it_wait(start):
    service = await start(groups_per_step=1)
    await answer(service)
    await train(service, 0)
    old = (await lease(service, version=0)).leases[0]  # due at step 1
    await answer(service, version=1, worker="r1")
    learner = asyncio.create_task(service.sample(step=1, timeout_s=LONG))
    worker = asyncio.create_task(lease(service, version=0, timeout_s=SOON))
    assert "leased at version 0" in await waits_of(service, "learner")
    await service.release(worker="r0", keys=(old.key,))
    assert (await learner).step == 1
    assert "needs at least 1" in (await worker).reason


async def test_without_lag_it_is_the_synchronous_algorithm(start):
    service = await start(max_lag=0, steps=3)
    for step in range(3):
        assert (await lease(service, version=step - 1)).leases == ()
        keys = await answer(service, version=step, count=2)
        assert (await lease(service, version=step)).leases == ()
        batch = await service.sample(step=step, timeout_s=SOON)
        assert [g.group.key for g in batch.groups] == keys
        assert {g.group.oldest_version for g in batch.groups} == {step}
        assert (await lease(service, version=step)).leases == ()
        await service.commit(step=step, group_ids=batch.group_ids)
    assert (await lease(service, version=3)).exhausted


async def test_workers_that_wait_for_weights_are_told_so(start):
    service = await start(max_lag=0)
    await answer(service, count=2)
    await train(service, 0)
    answered = await lease(service, version=0)
    assert answered.reason == (
        "worker r0 holds version 0, step 1 with max_lag=0 needs at least 1: waiting for its weights"
    )


async def test_queued_appends_share_one_transaction(start, monkeypatch):
    service = await start(groups_per_step=8)
    sizes = []
    original = ShardStore.append_many

    def counting(self, groups):
        sizes.append(len(groups))
        return original(self, groups)

    monkeypatch.setattr(ShardStore, "append_many", counting)
    await answer(service, count=8)
    assert sizes == [8]


async def test_an_append_is_durable_when_it_returns(start, tmp_path):
    service = await start()
    keys = await answer(service, count=2)
    reader = ShardStore(tmp_path / "shard-000.sqlite3", read_only=True)
    assert [f"{e}.{i}" for e, i in reader.rows()[["epoch", "prompt_index"]].tolist()] == keys
    reader.close()


async def test_a_repeated_append_is_acknowledged_and_changes_nothing(start):
    service = await start()
    group = make_group((await lease(service)).leases[0].key)
    assert await asyncio.gather(service.append(group), service.append(group)) == [True, False]
    assert await service.append(group) is False
    stats = await service.stats()
    assert (stats["groups"], stats["fresh_waiting"], stats["in_flight"]) == (1, 1, 0)


async def test_of_two_groups_of_one_key_the_first_is_kept(start):
    service = await start()
    good, ahead = make_group(1), make_group(1, newest=1)
    assert await asyncio.gather(service.append(good), service.append(ahead)) == [True, False]
    assert (await service.stats())["fresh_waiting"] == 1


async def test_a_malformed_group_does_not_disturb_its_neighbours(start):
    service = await start(num_prompts=50)
    results = await asyncio.gather(
        service.append(make_group("0.1")),
        service.append(make_group("0:2")),
        return_exceptions=True,
    )
    assert results[0] is True
    assert "malformed" in str(results[1])


async def test_an_unscored_group_makes_room_for_another_prompt(start):
    service = await start(max_lag=0)
    leases = (await lease(service, count=2)).leases
    waiting = asyncio.create_task(lease(service, worker="r1", timeout_s=LONG))
    await waits_of(service, "r1")
    await service.append(unscored_group(leases[0].key))
    assert len((await waiting).leases) == 1
    stats = await service.stats()
    assert stats["unusable"]["unscored"] == 1
    assert (stats["fresh_waiting"], stats["in_flight"]) == (0, 2)


async def test_a_group_of_fewer_verdicts_than_min_verdicts_is_unscored_and_makes_room(start):
    service = await start(max_lag=0, min_verdicts=3)
    leases = (await lease(service, count=2)).leases
    await service.append(make_group(leases[0].key, rewards=(0.0, 1.0, None, None)))
    await service.append(make_group(leases[1].key, rewards=(0.0, 1.0, 1.0, None)))
    stats = await service.stats()
    assert (stats["unusable"]["unscored"], stats["fresh_waiting"]) == (1, 1)
    assert len((await lease(service, count=2)).leases) == 1
    # Of equal verdicts, only the group that has enough counts as one without signal.
    await service.append(make_group("0.40", rewards=(1.0, 1.0, None, None)))
    await service.append(make_group("0.41", rewards=(1.0, 1.0, 1.0, None)))
    assert (await service.stats())["no_signal"] == 1


async def test_a_resume_counts_verdicts_by_its_own_min_verdicts(start):
    service = await start(groups_per_step=2, stale_fraction=0.5, max_replay_lag=4, min_verdicts=2)
    keys = [x.key for x in (await lease(service, count=2)).leases]
    rewards = {keys[0]: (0.0, 1.0, None), keys[1]: (0.0, 1.0, 1.0)}
    for key in keys:
        await service.append(make_group(key, rewards=rewards[key]))
    assert [g.group.key for g in (await train(service, 0)).groups] == [keys[0]]
    await service.close()
    # The group of two verdicts was trained on and stays so, but is not drawn again; the other is fresh as before.
    service = await start(
        groups_per_step=2, stale_fraction=0.5, max_replay_lag=4, min_verdicts=3, resume_step=1, max_lag=2
    )
    assert (await service.stats())["stale_eligible"] == 0
    assert [g.group.key for g in (await train(service, 1)).groups] == [keys[1]]
    two = await start_answer(service, rewards=(0.0, 1.0, None), version=2)
    assert (await service.stats())["unusable"]["unscored"] == 2
    await service.close()
    # What was left out is fresh once the setting lets it.
    service = await start(
        groups_per_step=2, stale_fraction=0.5, max_replay_lag=4, min_verdicts=2, resume_step=2, max_lag=2
    )
    stats = await service.stats()
    assert (stats["unusable"]["unscored"], stats["fresh_waiting"], stats["stale_eligible"]) == (0, 1, 2)
    assert two in {g.group.key for g in (await train(service, 2)).groups}


async def start_answer(service, *, rewards, version):
    """The key of a prompt that was leased and answered with these rewards."""
    [granted] = (await lease(service, version=version)).leases
    await service.append(make_group(granted.key, version=version, rewards=rewards))
    return granted.key


async def test_a_late_group_that_no_longer_fits_is_kept_and_never_trained(start):
    service = await start(groups_per_step=1, max_lag=0, lease_s=0.01)
    late = (await lease(service)).leases[0]
    while (await service.stats())["in_flight"]:
        await asyncio.sleep(0)
    assert await service.append(make_group((late.index + 1) % 50))  # nobody holds a lease, so it fits
    await train(service, 0)
    assert await service.append(make_group(late.key))
    assert (await service.stats())["unusable"]["late"] == 1
    assert await service.sample(step=1, timeout_s=SOON) is None


async def test_a_group_of_versions_to_come_is_kept_and_never_trained(start):
    service = await start()
    assert await service.append(make_group(1, version=0, newest=1))
    assert (await service.stats())["unusable"]["ahead"] == 1


async def test_a_sample_is_repeated_until_it_is_committed(start):
    service = await start()
    await answer(service, count=3)
    first = await service.sample(step=0, timeout_s=SOON)
    again = await asyncio.gather(*(service.sample(step=0, timeout_s=SOON) for _ in range(3)))
    assert {b.group_ids for b in again} == {first.group_ids}
    with pytest.raises(ValueError, match="step 0 was sampled as"):
        await service.commit(step=0, group_ids=(3, 1))
    await service.commit(step=0, group_ids=first.group_ids)
    await service.commit(step=0, group_ids=first.group_ids)
    with pytest.raises(ValueError, match="step 0 cannot be sampled: the next step is 1"):
        await service.sample(step=0, timeout_s=SOON)


async def test_stats_say_what_is_there_and_who_waits(start):
    service = await start(groups_per_step=4, stale_fraction=0.5, max_replay_lag=4)
    await answer(service, count=2)
    await train(service, 0)
    await answer(service, version=1, count=3)
    batch = await service.sample(step=1, timeout_s=SOON)
    assert [g.kind for g in batch.groups] == [Kind.FRESH] * 2 + [Kind.STALE] * 2
    await service.commit(step=1, group_ids=batch.group_ids)
    await lease(service, version=2)
    learner = asyncio.create_task(service.sample(step=2, timeout_s=LONG))
    await waits_of(service, "learner")
    stats = await service.stats()
    (wait,) = stats.pop("waits")
    assert wait["who"] == "learner"
    assert wait["what"].startswith("step 2 has 1 of 2 fresh groups, 1 prompts are in flight: ")
    assert wait["since_s"] > 0
    held = sum(len(encode(group)) for group in (await service.read([1, 2, 3, 4, 5])).values())
    assert stats == {
        "version": 2,
        "groups": 5,
        "trajectories": 10,
        "sampled_tokens": 30,
        "outcomes": {"scored": 10, "truncated": 0, "no_verdict": 0, "timeout": 0, "error": 0},
        "uses": {"fresh": 4, "stale": 2},
        "unusable": {"unscored": 0, "late": 0, "ahead": 0, "damaged": 0},
        "no_signal": 0,
        "held_groups": 5,
        "shards": [{"shard": 0, "attached": True, "groups": 5, "held_bytes": held, "pending": 0, "trouble": ""}],
        "held_bytes": held,
        "troubles": [],
        "fresh_waiting": 1,
        "in_flight": 1,
        "stale_eligible": 4,
        "draining": False,
    }
    learner.cancel()


async def test_a_worker_that_is_gone_gives_all_its_prompts_back(start):
    service = await start()
    gone = (await lease(service, count=2)).leases
    (kept,) = (await lease(service, worker="r1")).leases
    await service.service.release_worker(worker="r0")
    again = (await lease(service, count=2, worker="r1")).leases
    assert [x.key for x in again] == [x.key for x in gone]
    assert kept.key not in {x.key for x in again}


async def test_a_worker_that_is_gone_while_it_asks_is_granted_nothing_any_more(start):
    service = await start(groups_per_step=1, max_lag=0)
    (held,) = (await lease(service, worker="r1")).leases
    asking = asyncio.create_task(lease(service, worker="r0", timeout_s=LONG))
    await waits_of(service, "r0")
    await service.service.release_worker(worker="r0")
    assert (await asking).reason == "the worker is gone"
    await service.release(worker="r1", keys=(held.key,))
    # What it asked before its end may come after it.
    assert (await lease(service, worker="r0")).reason == "the worker is gone"
    assert (await lease(service, worker="r1")).leases[0].key == held.key


@pytest.mark.parametrize("cancelled", ["append_many", "choose", "commit"])
async def test_a_caller_cancelled_while_the_disk_works_leaves_memory_and_disk_in_step(start, monkeypatch, cancelled):
    service = await start(groups_per_step=1)
    (held,) = (await lease(service)).leases
    disk_is_busy, go_on = threading.Event(), threading.Event()

    async def call(store, name, call):
        if name != cancelled:
            return await call
        original = getattr(store, name)

        def slow(self, *args, **options):
            disk_is_busy.set()
            go_on.wait()
            return original(self, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(store, name, slow)
            task = asyncio.create_task(call)
            await asyncio.to_thread(disk_is_busy.wait)
            task.cancel()
            await asyncio.wait([task])
            go_on.set()
            assert task.cancelled()
        while any(state["pending"] for state in (await service.stats())["shards"]):
            await asyncio.sleep(0)

    await call(ShardStore, "append_many", service.append(make_group(held.key)))
    assert (await service.stats())["in_flight"] == 0
    await call(ConsumptionLog, "choose", service.service.sample(step=0, timeout_s=LONG))
    assert (await service.stats())["fresh_waiting"] == 0
    await call(ConsumptionLog, "commit", service.commit(step=0, group_ids=(1,)))
    assert (await service.stats())["version"] == 1
    await answer(service, version=1)
    assert (await train(service, 1)).group_ids == (2,)


async def test_draining_ends_the_workers_and_lets_the_learner_finish(start):
    service = await start()
    leases = (await lease(service, count=2)).leases
    waiting = asyncio.create_task(lease(service, worker="r1", version=7, timeout_s=LONG))
    await waits_of(service, "r1")
    await service.service.set_draining()
    told = await waiting
    assert (told.leases, told.exhausted) == ((), True)
    assert "draining" in told.reason
    for held in leases:
        await service.append(make_group(held.key))
    assert (await train(service, 0)).step == 0


async def test_close_ends_every_wait_and_lets_another_open_the_store(start):
    service = await start()
    learner = asyncio.create_task(service.sample(step=0, timeout_s=LONG))
    worker = asyncio.create_task(lease(service, version=7, timeout_s=LONG))
    await waits_of(service, "learner")
    await waits_of(service, "r0")
    appended = asyncio.create_task(service.append(make_group(1)))
    await asyncio.sleep(0)
    await service.close()
    assert await appended
    assert await learner is None
    assert (await worker).exhausted
    for call in (service.append(make_group(2)), service.stats()):
        with pytest.raises(ReplayError, match="is closed"):
            await call
    assert (await (await start(resume_step=0)).stats())["groups"] == 1


async def test_a_full_disk_holds_the_append_says_so_and_goes_on_when_there_is_room(start, monkeypatch):
    monkeypatch.setattr("replay.shard_service.RETRY_S", 0.001)
    service = await start(lease_s=0.5)
    (held,) = (await lease(service)).leases
    with monkeypatch.context() as full:
        full.setattr(ShardStore, "append_many", no_room)
        appended = asyncio.create_task(service.append(make_group(held.key)))
        while not (troubles := (await service.stats())["troubles"]):
            await asyncio.sleep(0)
        assert troubles == ["shard-000.sqlite3: no room; make room, it then goes on by itself"]
        await asyncio.sleep(0.7)
        stats = await service.stats()
        assert (stats["in_flight"], stats["shards"][0]["pending"]) == (1, 1)  # its lease does not expire
    assert await appended
    stats = await service.stats()
    assert (stats["troubles"], stats["fresh_waiting"], stats["in_flight"]) == ([], 1, 0)


async def test_a_full_disk_holds_the_commit_and_loses_nothing(start, monkeypatch):
    monkeypatch.setattr("replay.log_thread.RETRY_S", 0.001)
    service = await start()
    await answer(service, count=2)
    batch = await service.sample(step=0, timeout_s=SOON)
    with monkeypatch.context() as full:
        full.setattr(ConsumptionLog, "commit", no_room)
        committed = asyncio.create_task(service.commit(step=0, group_ids=batch.group_ids))
        while not (await service.stats())["troubles"]:
            await asyncio.sleep(0)
    await committed
    assert (await service.stats())["version"] == 1


def no_room(self, *args, **options):
    raise DiskFull(f"{self.path.name}: no room")


# resume


async def test_a_new_run_refuses_the_store_of_an_old_one_and_lets_go_of_it(start):
    service = await start()
    await answer(service)
    await service.close()
    with pytest.raises(
        ValueError, match="holds 1 groups of an earlier run: resume it with --resume, or choose another name"
    ):
        await start()
    await start(resume_step=0)


async def test_two_jobs_on_one_store_are_refused(start):
    await start()
    with pytest.raises(ReplayError, match="two runs cannot write one store"):
        await start()


async def test_resume_goes_on_where_the_checkpoint_stands(start):
    service = await start(num_prompts=6)
    done = await answer(service, count=4)
    first = await train(service, 0)
    second = await train(service, 1)
    lost = (await lease(service, version=2)).leases[0].key
    await service.close()
    service = await start(num_prompts=6, resume_step=1)
    assert (await service.stats())["fresh_waiting"] == 2
    assert (await train(service, 1)).group_ids == second.group_ids
    keys = [x.key for x in (await lease(service, version=2, count=2)).leases]
    assert keys[0] == lost
    assert not set(keys) & set(done)
    assert first.group_ids == (1, 2)


async def test_resume_drops_what_later_weights_sampled(start):
    service = await start()
    await answer(service, count=2)
    await train(service, 0)
    await answer(service, version=1, count=2)
    await service.close()
    service = await start(resume_step=0)
    stats = await service.stats()
    assert (stats["fresh_waiting"], stats["unusable"]["ahead"]) == (2, 2)
    assert len((await lease(service, count=9)).leases) == 2


async def test_resume_with_a_smaller_max_lag_leaves_out_what_no_longer_fits(start):
    service = await start(max_lag=2)
    await answer(service, count=6)
    await train(service, 0)
    await service.close()
    service = await start(max_lag=1, resume_step=1)
    stats = await service.stats()
    assert (stats["fresh_waiting"], stats["unusable"]["late"]) == (2, 2)
    assert [g.group.oldest_version for g in (await train(service, 1)).groups] == [0, 0]


async def test_resume_refuses_a_checkpoint_that_the_store_does_not_know(start):
    with pytest.raises(ValueError, match="knows 0 committed steps and cannot go on at step 3"):
        await start(resume_step=3)


async def test_resume_refuses_other_data(start):
    service = await start(num_prompts=50)
    await service.append(make_group("0.40"))
    await service.close()
    with pytest.raises(ValueError, match="the task has 40 prompts"):
        await start(num_prompts=40, resume_step=0)
    await start(num_prompts=50, resume_step=0)


@pytest.mark.parametrize("fresh", [0, 1, 2, 3, 4])
async def test_resume_never_stalls_whatever_the_store_held(start, fresh):
    service = await start()
    await answer(service, count=4)
    await train(service, 0)
    await train(service, 1)
    if fresh:
        await answer(service, version=2, count=fresh)
    await service.close()
    service = await start(resume_step=2)
    missing = max(0, 2 - fresh)
    if missing:
        await answer(service, version=2, count=missing)
    assert len((await train(service, 2)).groups) == 2


# a whole run


@pytest.mark.parametrize("max_lag", [0, 1, 3])
async def test_a_run_with_failing_workers_ends_and_keeps_every_bound(start, max_lag, tmp_path):
    steps, num_fresh = 12, 3
    service = await start(
        groups_per_step=5,
        stale_fraction=0.4,
        steps=steps,
        max_lag=max_lag,
        max_replay_lag=4,
        lease_s=0.05,
        num_prompts=7,
    )
    published = 0
    lags = {Kind.FRESH: [], Kind.STALE: []}

    async def generate(name, rng):
        held = 0
        while not (answered := await lease(service, worker=name, version=held, count=2, timeout_s=0.05)).exhausted:
            for x in answered.leases:
                fate = rng.random()
                if fate < 0.1:
                    await service.release(worker=name, keys=(x.key,))
                elif fate < 0.2:
                    pass  # forgotten: it expires
                elif fate < 0.3:
                    await service.append(unscored_group(x.key, version=held))
                else:
                    await asyncio.sleep(rng.choice([0, 0.01, 0.07]))  # the last one comes late
                    await service.append(make_group(x.key, version=held, newest=max(held, published)))
            if rng.random() < 0.7:
                held = published

    async def learn():
        nonlocal published
        for step in range(steps):
            while (batch := await service.sample(step=step, timeout_s=0.1)) is None:
                pass
            for g in batch.groups:
                lags[g.kind].append(step - g.group.oldest_version)
            await service.commit(step=step, group_ids=batch.group_ids)
            published = step + 1

    workers = [generate(f"r{i}", random.Random(i)) for i in range(3)]
    await asyncio.wait_for(asyncio.gather(learn(), *workers), timeout=60)
    assert len(lags[Kind.FRESH]) == steps * num_fresh
    assert set(lags[Kind.FRESH]) <= set(range(max_lag + 1))
    assert lags[Kind.STALE]
    assert set(lags[Kind.STALE]) <= set(range(5))
    await service.close()
    with StoreReader(tmp_path) as reader:
        assert list(reader.verify()) == []


async def test_a_worker_that_asks_again_ends_its_earlier_ask(start):
    service = await start(max_lag=0)
    await answer(service, count=2)
    earlier = asyncio.create_task(lease(service, version=0, timeout_s=LONG))
    await waits_of(service, "r0")
    await train(service, 0)
    later = await lease(service, version=1, timeout_s=LONG)
    assert (await earlier).leases == ()
    assert "asked again" in (await earlier).reason
    assert len(later.leases) == 1


async def test_a_rewind_makes_the_consumed_groups_fresh_again_and_takes_all_leases_back(start):
    service = await start(groups_per_step=1, max_lag=2, steps=9)
    keys = [(await answer(service))[0]]
    await train(service, 0)
    keys += await answer(service, version=1)
    await train(service, 1)
    old = (await lease(service, version=2)).leases[0]
    await service.rewind(step=1)
    stats = await service.stats()
    assert (stats["version"], stats["in_flight"], stats["fresh_waiting"]) == (1, 0, 1)
    batch = await train(service, 1)
    assert [group.group.key for group in batch.groups] == [keys[1]]
    refused = await lease(service, version=1)
    assert (refused.leases, refused.reason) == ((), "worker r0 holds weights that the learner has gone back behind")
    again = (await lease(service, version=1, lineage=1, worker="r1")).leases[0]
    assert again.key == old.key


async def test_after_a_rewind_groups_of_versions_that_were_undone_are_never_drawn(start):
    service = await start(groups_per_step=1, max_lag=2, steps=9)
    for step in range(2):
        await answer(service, version=step)
        await train(service, step)
    late = (await lease(service, version=2)).leases[0]
    await answer(service, version=2, worker="r1")
    await service.rewind(step=1)
    await service.append(make_group(late.key, version=2))
    stats = await service.stats()
    assert stats["unusable"]["ahead"] == 2
    assert stats["fresh_waiting"] == 1


async def test_a_rewind_ends_the_questions_of_workers_and_a_batch_that_was_chosen(start):
    service = await start(groups_per_step=1, max_lag=0)
    await answer(service)
    await train(service, 0)
    await answer(service, version=1)
    assert await service.sample(step=1, timeout_s=SOON) is not None
    asking = asyncio.create_task(lease(service, version=1, timeout_s=LONG))
    await waits_of(service, "r0")
    await service.rewind(step=0)
    assert (await asking).reason == "the worker has asked again since"
    batch = await service.sample(step=0, timeout_s=SOON)
    assert [group.group_id for group in batch.groups] == [1]


async def test_a_rewind_beyond_what_was_committed_is_refused(start):
    service = await start(groups_per_step=1)
    with pytest.raises(ValueError, match="knows 0 committed steps and cannot go on at step 1"):
        await service.rewind(step=1)


async def test_a_rewind_with_a_shard_away_is_complete_once_the_shard_is_back(start):
    service = await start(groups_per_step=1, max_lag=2, shards=2, steps=9)
    keys = await answer(service, count=1)
    await train(service, 0)
    await service.detach(0)
    await service.rewind(step=0)
    assert (await lease(service)).leases == ()
    await service.attach(0)
    batch = await service.sample(step=0, timeout_s=SOON)
    assert [group.group.key for group in batch.groups] == keys


async def test_a_group_that_has_become_too_old_with_a_commit_is_not_counted_as_eligible(start):
    service = await start(groups_per_step=1, max_lag=5, max_replay_lag=1, steps=9)
    await answer(service, count=3)
    eligible = []
    for step in range(3):
        await train(service, step)
        eligible.append((await service.stats())["stale_eligible"])
    assert eligible == [1, 0, 0]
