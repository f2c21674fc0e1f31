"""The wires between rooms, on fakes of what is at their other ends."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from r2vpo.job import links
from r2vpo.job.component import ComponentDied, JobFailed
from r2vpo.job.links import ReplayLink, ShardDied, ShardedBatch, ShardLink, WeightLink
from r2vpo.records import Canary, WeightManifest
from replay.errors import ReplayError
from replay.rows import shard_of_key
from replay.serialize import encode
from tests.job.fakes import Method, Served, component, remote
from tests.job.store_fakes import FakeReplay, FakeShard, plan
from tests.replay.replay_groups import make_group, same


def shard_link(shard: FakeShard) -> tuple[ShardLink, Served]:
    actor = Served(shard)
    return ShardLink(links.Component(name="replay shard 0", actor=actor)), actor


def replay_link(replay: FakeReplay) -> ReplayLink:
    return ReplayLink(links.Component(name="replay store", actor=Served(replay)), shards=len(replay.links))


async def test_a_group_goes_to_the_shard_of_its_key_and_says_whether_it_is_new():
    replay, files = FakeReplay(shards=2), ({}, {})
    for shard in range(2):
        await replay.attach(shard, shard_link(FakeShard(files[shard]))[0])
    link = replay_link(replay)
    for index in range(8):
        assert await link.append(make_group(index))
    assert not await link.append(make_group(3))
    assert all(files), "eight keys must not all fall on one shard"
    for shard, file in enumerate(files):
        assert all(shard_of_key(key, 2) == shard for key in file)
    assert replay_link(replay)._found == {}  # each link asks for itself
    assert link.replay.actor.calls.count("locate") == 2  # once per shard


async def test_a_group_whose_shard_dies_while_it_writes_is_given_to_the_next_one_which_knows_it():
    replay, file = FakeReplay(shards=1), {}
    dying = FakeShard(file)
    dying.hold = asyncio.Event()
    old, actor = shard_link(dying)
    await replay.attach(0, old)
    link = replay_link(replay)
    append = asyncio.create_task(link.append(make_group(0)))
    while not file:
        await asyncio.sleep(0)
    actor.die()  # it is written, and nobody was told
    await asyncio.sleep(0.01)
    assert not append.done()
    await replay.attach(0, shard_link(FakeShard(file))[0])
    assert await append is False
    assert list(file) == ["0.0"]
    assert link.replay.actor.calls == ["locate", "locate"], "it waits for the next generation, and does not ask around"


async def test_a_shard_that_never_returns_fails_the_append_in_the_end(monkeypatch):
    monkeypatch.setattr(links, "APPEND_S", 0.01)
    with pytest.raises(JobFailed, match=r"^replay shard 0 did not take the group of prompt 0\.5 within"):
        await replay_link(FakeReplay(shards=1)).append(make_group(5))


async def test_a_store_that_cannot_locate_a_shard_in_time_is_asked_again_with_a_pause(monkeypatch):
    monkeypatch.setattr(links, "PAUSE_S", 0.0)
    answers = [None, None, (1, shard_link(FakeShard({}))[0])]

    class Slow(FakeReplay):
        async def locate(self, shard, *, after, timeout_s):
            return answers.pop(0)

    assert await replay_link(Slow(shards=1)).append(make_group(0))
    assert answers == []


async def test_a_malformed_group_is_the_workers_own_error():
    with pytest.raises(ValueError, match="older than its"):
        await replay_link(FakeReplay(shards=1)).append(make_group(0, version=1, lease_version=2))


async def test_a_worker_hears_that_it_is_the_store_that_died():
    link = ReplayLink(component(ActorDiedError(), "replay store", None), shards=1)
    for call in (
        link.lease(worker="rollout-0", stamp=(0, 0), count=1, timeout_s=1),
        link.release(worker="rollout-0", keys=()),
        link.append(make_group()),
    ):
        with pytest.raises(ComponentDied, match=r"^replay store died"):
            await call


async def test_the_death_of_a_shard_is_a_fault_of_the_store_in_its_own_words_too():
    link = ShardLink(component(ActorDiedError(), "replay shard 1", None))
    for call in (link.rows(), link.epochs(), link.answered(0), link.evict([1]), link.held(), link.stats()):
        with pytest.raises(ReplayError, match=r"^replay shard 1 died") as caught:
            await call
        assert isinstance(caught.value, ShardDied)


async def test_reading_waits_for_the_problems_and_moves_no_payload():
    link, _ = shard_link(FakeShard({}, damaged={3: "group 3 is damaged"}))
    payloads, problems = await link.read([1, 3])
    assert problems == {3: "group 3 is damaged"}
    assert await payloads == [b"payload 1", b"payload 3"]
    dead, actor = shard_link(FakeShard({}))
    actor.die()
    with pytest.raises(ShardDied):
        await dead.read([1])


def test_a_batch_is_put_together_in_the_order_of_its_plan(monkeypatch):
    groups = {i: make_group(i) for i in (5, 2, 1)}
    batch = ShardedBatch(
        plan=plan(3, 5, 2, 1),
        group_ids=((5, 1), (2,)),
        payloads=([encode(groups[5]), encode(groups[1])], [encode(groups[2])]),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(links.ray, "get", lambda refs, timeout: refs)
    fetched = batch.fetch()
    assert (fetched.step, fetched.group_ids) == (3, (5, 2, 1))
    assert all(same(sampled.group, groups[sampled.group_id]) for sampled in fetched.groups)


def test_payloads_that_do_not_arrive_fail_the_step_with_a_sentence(monkeypatch):
    def lost(refs, timeout):
        raise RayTaskError("read", "Traceback …", OSError("lost"), proctitle="p", pid=1, ip="127.0.0.1")

    monkeypatch.setattr(links.ray, "get", lost)
    batch = ShardedBatch(plan=plan(3, 1), group_ids=((1,),), payloads=())
    with pytest.raises(JobFailed, match="groups of step 3 did not arrive"):
        batch.fetch()


async def test_weights_that_are_superseded_or_went_with_their_learner_are_looked_for_again():
    manifest = WeightManifest(version=3, buckets=(), canary=Canary(token_ids=(1,), logprobs=()))
    with pytest.raises(LookupError):
        await WeightLink(component(remote(LookupError(3)), "weight board", None)).fetch(manifest)
    lost = [Method(ActorDiedError()).remote()]
    with pytest.raises(LookupError, match=r"^version 3 of the learner's weights is lost"):
        await WeightLink(component(lost, "weight board", None)).fetch(manifest)
