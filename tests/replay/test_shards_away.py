"""What happens while shards are away and when they are back, and to groups that arrive just then."""

import asyncio
import contextlib

import pytest

from replay import shard_service
from replay.config import ReplayConfig
from replay.errors import DiskFull, ReplayError
from replay.local import LocalStore
from replay.rows import encode_group, shard_of_key
from replay.schema import shard_file
from replay.shard import ShardStore
from replay.shard_service import ShardService
from tests.replay.replay_groups import make_group
from tests.replay.stored_runs import keys_of_shard


@pytest.fixture
async def start(tmp_path):
    started = []

    async def start(*, groups_per_step=2, resume_step=None, shards=2, **config):
        settings = ReplayConfig(**{"max_lag": 1, "stale_fraction": 0.0, "shards": shards, **config})
        store = LocalStore(
            tmp_path,
            config=settings,
            num_prompts=60,
            groups_per_step=groups_per_step,
            steps=20,
            seed=0,
            resume_step=resume_step,
        )
        started.append(store)
        await store.open()
        return store

    yield start
    for store in started:
        await store.close()


async def lease(store, count, *, version=0, worker="r0"):
    return [x.key for x in (await store.lease(worker=worker, stamp=(0, version), count=count, timeout_s=0)).leases]


async def lease_of(store, shard, count, *, version=0):
    """Lease until ``count`` prompts of a shard are held; the others go back."""
    held = await lease(store, 99, version=version)
    mine = [key for key in held if shard_of_key(key, len(store.shards)) == shard][:count]
    await store.release(worker="r0", keys=tuple(key for key in held if key not in mine))
    return mine


async def train(store, step):
    batch = await store.sample(step=step, timeout_s=0)
    await store.commit(step=step, group_ids=batch.group_ids)
    return [sampled.group.key for sampled in batch.groups]


async def test_leases_of_a_shard_that_is_away_do_not_make_groups_of_others_late(start):
    store = await start(max_lag=1)  # two fresh groups a step: four prompts may be out
    first = await lease(store, 4)
    away = shard_of_key(first[0], 2)
    await store.detach(away)
    # Those of the shard that is away do not count, so that as many others are handed out.
    lost = [key for key in first if shard_of_key(key, 2) == away]
    more = await lease(store, 4)
    assert len(more) == len(lost) >= 1
    there = [key for key in first if key not in lost] + more
    for key in there:
        await store.append(make_group(key))
    stats = await store.stats()
    assert (stats["unusable"]["late"], stats["fresh_waiting"]) == (0, 4)
    assert sorted(await train(store, 0) + await train(store, 1)) == sorted(there)


async def test_groups_that_were_trained_on_while_their_shard_was_away_are_not_drawn_before_it_is_back(start):
    store = await start(stale_fraction=0.5, groups_per_step=4, max_replay_lag=9)
    for step in range(2):
        for key in await lease(store, 4, version=step):
            await store.append(make_group(key, version=step))
    plan = await store.service.sample(step=0, timeout_s=0)
    away = (plan.group_ids[0] - 1) % 2
    await store.detach(away)
    await store.commit(step=0, group_ids=plan.group_ids)
    assert all((i - 1) % 2 != away for i in range(1, 20) if i in store.service._index.pool)
    await store.attach(away)
    assert {i for i in plan.group_ids if i in store.service._index.pool} == set(plan.group_ids)


async def test_a_shard_that_returns_with_a_group_too_old_to_train_on_ends_its_lease(start, tmp_path):
    store = await start(max_lag=0, groups_per_step=1, max_replay_lag=0, lease_s=600.0)
    key = (await lease(store, 1))[0]
    away = shard_of_key(key, 2)
    await store.detach(away)
    # Its process had written the group, and died before it could say so.
    beside = ShardStore(tmp_path / shard_file(away), shard=away, shards=2)
    beside.append_many([encode_group(make_group(key))])
    beside.close()
    for step in range(2):
        [other] = await lease(store, 1, version=step)
        await store.append(make_group(other, version=step))
        await train(store, step)
    await store.attach(away)
    assert key not in store.service._dispatcher.ledger.live
    handed_out = []
    for step in range(2, 10):
        [other] = await lease(store, 1, version=step)
        handed_out.append(other)
        await store.append(make_group(other, version=step))
        await train(store, step)
    assert key not in handed_out


class Between:
    """A shard to which a group is appended while its content is being read."""

    def __init__(self, shard, group):
        self._shard, self._group = shard, group

    def __getattr__(self, name):
        async def ask(*args, **options):
            result = await getattr(self._shard, name)(*args, **options)
            if name in ("rows", "epochs", "answered") and self._group is not None:
                group, self._group = self._group, None
                appended = asyncio.ensure_future(self._shard.append(encode_group(group)))
                while not (await self._shard.answered(0)).size:
                    await asyncio.sleep(0)
                self.appended = appended
            return result

        return ask


async def test_a_group_that_is_appended_while_the_shards_are_read_is_answered_once_and_for_all(start, tmp_path):
    settings = ReplayConfig(max_lag=1, stale_fraction=0.0)
    store = LocalStore(tmp_path, config=settings, num_prompts=5, groups_per_step=1, steps=20, seed=0, resume_step=0)
    shard = store.shards[0] = ShardService(str(tmp_path / shard_file(0)), listener=store.service)
    key = "0.3"
    link = Between(shard, make_group(key))
    await store.service.attach(0, link)
    await link.appended
    assert (await store.stats())["fresh_waiting"] == 1
    keys = await lease(store, 99)
    for step in range(4):
        for other in keys:
            await store.append(make_group(other, version=step))
        await train(store, step)
        keys = await lease(store, 99, version=step + 1)
        assert key not in keys
    await store.close()


async def test_a_second_attach_without_a_detach_counts_nothing_twice(start):
    store = await start(max_lag=1)
    keys = await lease(store, 4)
    for key in keys[:2]:
        await store.append(make_group(key))
    for shard in range(2):
        await store.service.attach(shard, store.shards[shard])
    stats = await store.stats()
    assert (stats["fresh_waiting"], stats["in_flight"], stats["unusable"]["late"]) == (2, 2, 0)
    assert sorted(await train(store, 0)) == sorted(keys[:2])
    for key in keys[2:]:
        await store.append(make_group(key))
    assert (await store.stats())["unusable"]["late"] == 0


async def test_eviction_is_put_off_while_shards_are_away_or_lost_and_made_up_for(start, caplog):
    store = await start(max_lag=0, groups_per_step=2, capacity_groups=6)
    for step in range(3):
        for key in await lease(store, 2, version=step):
            await store.append(make_group(key, version=step))
        await train(store, step)
    assert (await store.stats())["held_groups"] == 6  # all are needed: the run may go back to step 0
    await store.service._sweep
    await store.detach(0)
    lost, store.service._shards[1].link = store.service._shards[1].link, Lost()
    await store.service.keep_from(step=3)
    await store.service._sweep
    assert caplog.messages[-1] == "eviction is put off: its process died"
    store.service._shards[1].link = None
    await store.service.keep_from(step=3)
    await store.service._sweep  # nobody is there
    store.service._shards[1].link = lost
    await store.attach(0)
    await store.service.keep_from(step=3)
    await store.service._sweep
    assert (await store.stats())["held_groups"] == 4  # the two of the next step have room


class Lost:
    """A shard whose process is gone."""

    def __getattr__(self, name):
        async def ask(*args, **options):
            raise ReplayError("its process died")

        return ask


async def test_a_closed_shard_says_so(tmp_path):
    shard = ShardService(str(tmp_path / shard_file(0)), listener=Listening())
    await shard.close()
    for asked in (shard.rows(), shard.read([1]), shard.append(encode_group(make_group(0)))):
        with pytest.raises(ReplayError, match=r"shard-000.sqlite3 is closed"):
            await asked


async def test_a_rewind_that_meets_a_dead_shard_waits_until_it_is_back(start):
    store = await start(max_lag=1, groups_per_step=2)
    keys = await lease(store, 4)
    for key in keys:
        await store.append(make_group(key))
    first = await train(store, 0)
    store.service._shards[1].link = Lost()  # its process is gone, and nobody knows it yet
    rewinding = asyncio.create_task(store.service.rewind(step=0))
    while store.service._index is not None:
        await asyncio.sleep(0)
    assert await store.sample(step=0, timeout_s=0) is None
    assert not rewinding.done()
    await store.detach(1)
    await rewinding
    assert await store.sample(step=0, timeout_s=0) is None
    await store.attach(1)
    assert (await store.stats())["fresh_waiting"] == 4
    assert await train(store, 0) == first


async def test_a_file_that_cannot_be_read_ends_a_rewind(start, monkeypatch):
    monkeypatch.setattr("replay.service.LOST_S", 0.01)
    store = await start()
    there, store.service._shards[1].link = store.service._shards[1].link, Lost()
    with pytest.raises(ReplayError, match="its process died"):
        await store.service.rewind(step=0)
    store.service._shards[1].link = there


async def test_a_shard_that_dies_again_while_it_is_attached_is_away_as_before(start):
    store = await start()
    await store.detach(1)
    with pytest.raises(ReplayError, match="its process died"):
        await store.service.attach(1, Lost())
    assert (await store.stats())["shards"][1]["trouble"] == "replay shard 1: its process died"
    assert await store.service.locate(1, after=0, timeout_s=0) is None
    await store.attach(1)
    assert (await store.stats())["troubles"] == []


class Listening:
    """Notes what a shard says."""

    def __init__(self):
        self.stalls = []

    async def appended(self, shard, rows):
        pass

    async def stalled(self, shard, sentence, keys):
        self.stalls.append((bool(sentence), sorted(keys)))


@pytest.fixture
async def full(tmp_path, monkeypatch):
    """A shard whose disk is full; one group fits into a transaction."""

    def no_room(self, groups):
        raise DiskFull("no room")

    monkeypatch.setattr(shard_service, "RETRY_S", 0.001)
    monkeypatch.setattr(shard_service, "MAX_GROUPS", 1)
    monkeypatch.setattr(ShardStore, "append_many", no_room)
    listener = Listening()
    shard = ShardService(str(tmp_path / shard_file(0)), listener=listener)
    yield shard, listener
    await shard.close()


async def test_leases_of_all_groups_that_wait_for_the_disk_are_kept_not_only_of_those_being_written(full):
    shard, listener = full
    keys = keys_of_shard(0, 1, 3)
    appends = [asyncio.create_task(shard.append(encode_group(make_group(key)))) for key in keys]
    while not any(len(said) == 3 for _, said in listener.stalls):
        await asyncio.sleep(0.001)
    assert (True, sorted(keys)) in listener.stalls
    for task in appends:
        task.cancel()


async def test_whoever_waits_for_the_disk_of_a_shard_that_is_closed_is_told(full):
    shard, listener = full
    appends = [asyncio.create_task(shard.append(encode_group(make_group(index)))) for index in range(3)]
    while not listener.stalls:
        await asyncio.sleep(0.001)
    await shard.close()
    answers = await asyncio.wait_for(asyncio.gather(*appends, return_exceptions=True), timeout=30)
    assert [type(answer) for answer in answers] == [ReplayError] * 3
    with contextlib.suppress(ReplayError):
        await shard.append(encode_group(make_group(9)))
