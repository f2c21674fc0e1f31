"""The store as the driver sees it, on fakes: where shards lie, what becomes of one that dies, and of damaged groups."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from ray.exceptions import RayActorError

from r2vpo.job import component
from r2vpo.job.component import JobFailed, cancelled
from r2vpo.job.links import ShardedBatch
from r2vpo.job.store import Node, place_shards
from r2vpo.records import BatchPlan
from tests.job.store_fakes import HERE, MAX_RESTARTS, THERE, WINDOW_S, Room, plan


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(component, "WATCH_S", 0.0)


@pytest.fixture
async def room(tmp_path) -> AsyncIterator[Room]:
    """A store of two shards on one node, started and watched."""
    room = Room(tmp_path)
    await room.store.start()
    watching = asyncio.create_task(room.store.watch())
    yield room
    await cancelled(watching)


def unopened(sentence: str) -> RayActorError:
    return RayActorError(error_msg=f"The actor died …\n  File …\nReplayError: {sentence}", actor_init_failed=True)


def batch_of(batch_plan: BatchPlan) -> ShardedBatch:
    return ShardedBatch(plan=batch_plan, group_ids=(), payloads=())


async def until(holds) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0)


def test_new_shards_are_spread_over_the_nodes_from_the_drivers_on(tmp_path):
    third = Node(id="n2", host="third")
    assert place_shards(4, [HERE, THERE, third], {}, tmp_path) == [HERE, THERE, third, HERE]


def test_a_shard_goes_where_its_file_lies_even_if_others_have_joined(tmp_path):
    assert place_shards(3, [HERE, THERE], {0: "there", 1: "here"}, tmp_path) == [THERE, HERE, HERE]


def test_a_file_that_the_drivers_node_sees_is_taken_from_there_although_the_machine_was_renamed(tmp_path):
    (tmp_path / "shard-000.sqlite3").touch()
    assert place_shards(1, [HERE, THERE], {0: "laptop-7"}, tmp_path) == [HERE]


def test_a_shard_whose_host_is_gone_is_named_with_host_and_file(tmp_path):
    with pytest.raises(
        JobFailed, match=r"^replay shard 1 lies on host gone, which is not in the Ray cluster"
    ) as caught:
        place_shards(2, [HERE, THERE], {0: "here", 1: "gone"}, tmp_path)
    assert f"{tmp_path}/shard-001.sqlite3" in str(caught.value)
    assert "(hosts there: here, there)" in str(caught.value)


async def test_a_new_store_may_make_its_files_and_remembers_where(tmp_path):
    room = Room(tmp_path, HERE, THERE)
    await room.store.start()
    assert room.yard.launched == [(0, "here", False), (1, "there", False)]
    assert room.replay.known_hosts == {0: "here", 1: "there"}
    assert sorted(room.replay.heard) == [("attach", 0), ("attach", 1)]


async def test_a_store_that_was_there_must_have_its_files(tmp_path):
    room = Room(tmp_path, HERE, THERE)
    room.replay.known_hosts = {0: "there", 1: "here"}
    await room.store.start()
    assert room.yard.launched == [(0, "there", True), (1, "here", True)]


async def test_what_a_shard_says_when_it_cannot_open_its_file_is_the_runs_error(tmp_path):
    room = Room(tmp_path)
    room.yard.broken = [None, unopened("replay store s: file is not a database")]
    with pytest.raises(JobFailed, match=r"^replay shard 1 failed: replay store s: file is not a database; see"):
        await room.store.start()
    assert room.replay.known_hosts == {}, "a file that was never opened must not be asked for later"
    assert room.replay.heard == []


async def test_a_shard_that_dies_is_started_again_on_its_file_and_the_screen_says_so(room, tmp_path):
    room.yard.files[1]["0.7"] = b"kept"
    room.yard.actors[1].die()
    await until(lambda: room.replay.heard[-1] == ("attach", 1) and len(room.replay.heard) == 4)
    assert room.replay.heard[2:] == [("detach", 1), ("attach", 1)]
    assert room.yard.launched[2:] == [(1, "here", True)]
    assert room.yard.actors[1].served.file == {"0.7": b"kept"}
    await until(lambda: len(room.notes) == 2)
    assert room.notes == [
        "replay shard 1 died; restarting it on its file (1 of 3 within 10 min)",
        "replay shard 1 is back after 0.0 s",
    ]
    assert "ActorDiedError" in (tmp_path / "error.log").read_text()


async def test_a_restart_that_finds_the_file_locked_for_a_moment_is_made_again(room):
    room.yard.broken = [unopened("replay store s is in use by process 7"), None]
    room.yard.actors[0].die()
    await until(lambda: len(room.notes) == 3)
    assert room.notes[0] == "replay shard 0 died; restarting it on its file (1 of 3 within 10 min)"
    assert room.notes[1].startswith("replay shard 0 failed: replay store s is in use by process 7; see logs/error.log")
    assert room.notes[1].endswith("; restarting it on its file (2 of 3 within 10 min)")


async def test_a_shard_that_keeps_dying_ends_the_run(tmp_path):
    room = Room(tmp_path)
    await room.store.start()
    watching = asyncio.create_task(room.store.watch())
    for restart in range(MAX_RESTARTS):
        room.yard.actors[0].die()
        await until(lambda count=restart: len(room.yard.launched) == 3 + count)
        await until(lambda: room.notes[-1].startswith("replay shard 0 is back"))
    room.yard.actors[0].die()
    with pytest.raises(
        JobFailed, match=r"^replay shard 0 failed 4 times within 10 min, at last so: replay shard 0 died"
    ):
        await watching


async def test_restarts_of_long_ago_and_of_other_shards_do_not_count(room):
    for restart in range(MAX_RESTARTS + 2):
        for shard in (0, 1):
            room.yard.actors[shard].die()
            await until(lambda: room.notes and room.notes[-1].startswith(f"replay shard {shard} is back"))  # noqa: B023
            room.notes.clear()
        room.now_s += WINDOW_S / 2 if restart else WINDOW_S
    assert len(room.yard.launched) == 2 + 2 * (MAX_RESTARTS + 2)


async def test_a_batch_comes_with_the_payloads_of_each_shard(room):
    # ids of two shards: 1, 3, 5 … lie on shard 0, 2, 4 … on shard 1
    room.replay.plans = [plan(3, 5, 2, 1)]
    batch = await room.store.sample(step=3, timeout_s=1)
    assert batch is not None
    assert batch.group_ids == ((5, 1), (2,))
    assert [await payload for payload in batch.payloads] == [[b"payload 5", b"payload 1"], [b"payload 2"]]


async def test_no_batch_yet_is_no_error(room):
    assert await room.store.sample(step=0, timeout_s=0) is None


async def test_damaged_groups_are_set_aside_with_a_note_each_and_the_batch_is_drawn_again(room):
    room.yard.damaged |= {2: "group 2 (prompt 0.9) is damaged: its checksum is wrong"}
    room.replay.plans = [plan(3, 1, 2), plan(3, 1, 4)]
    assert await room.store.sample(step=3, timeout_s=1) is None
    assert room.replay.heard[-1][:2] == ("quarantine", 3)
    assert set(room.replay.heard[-1][2]) == {2}
    assert room.notes == [
        "group 2 (prompt 0.9) is damaged: its checksum is wrong; it is set aside, and the batch of step 3 drawn again"
    ]
    batch = await room.store.sample(step=3, timeout_s=1)
    assert batch is not None
    assert batch.plan.group_ids == (1, 4)


async def test_a_shard_that_dies_before_its_payloads_are_read_is_waited_for(room):
    room.replay.plans = [plan(0, 1, 2)]
    room.yard.actors[1].die()
    batch = await room.store.sample(step=0, timeout_s=1)
    assert batch is not None
    assert [await payload for payload in batch.payloads] == [[b"payload 1"], [b"payload 2"]]
    assert len(room.yard.launched) == 3


async def test_a_commit_waits_for_a_full_disk_until_there_is_room(room):
    stop = asyncio.Event()
    commit = asyncio.create_task(room.store.commit(batch_of(plan(3, 1, 2)), stop=stop.wait))
    await asyncio.sleep(0.01)
    assert not commit.done()
    room.replay.has_room.set()
    await commit
    assert room.replay.heard[-1] == ("commit", 3, (1, 2))


async def test_a_run_that_is_stopped_does_not_wait_for_a_full_disk(room, monkeypatch):
    monkeypatch.setattr("r2vpo.job.store.GOODBYE_S", 0.0)
    stop = asyncio.Event()
    stop.set()
    with pytest.raises(JobFailed, match=r"^step 3 was still waiting to be recorded .* --resume goes on from"):
        await room.store.commit(batch_of(plan(3, 1)), stop=stop.wait)


async def test_a_commit_that_is_answered_counts_although_the_run_was_stopped(room):
    stop = asyncio.Event()
    stop.set()
    room.replay.has_room.set()
    await room.store.commit(batch_of(plan(3, 1)), stop=stop.wait)
    assert room.replay.heard[-1] == ("commit", 3, (1,))


async def test_closing_leaves_nobody_out_although_one_is_dead(tmp_path):
    room = Room(tmp_path)
    await room.store.start()
    room.yard.actors[0].die()
    await room.store.close()
    assert room.yard.actors[1].calls[-1] == "close"
    assert room.store.replay.actor.calls[-1] == "close"
