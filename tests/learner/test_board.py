import asyncio

import pytest

from learner.board import WeightBoard
from r2vpo.records import BucketSpec, Canary, TensorSpec, WeightManifest

BUCKET = BucketSpec(tensors=(TensorSpec(name="w", dtype="float32", shape=(1,)),), num_bytes=4, checksum="")


def manifest(version, lineage=0):
    return WeightManifest(version=version, lineage=lineage, buckets=(BUCKET,), canary=Canary(token_ids=(), logprobs=()))


async def board_with(*versions):
    board = WeightBoard()
    for version in versions:
        await board.post(manifest(version), [f"reference {version}"])
    return board


async def test_the_newest_version_is_returned_at_once_if_it_is_newer():
    board = await board_with(0, 1)
    assert (await board.newest(after=(0, -1), timeout_s=60)).version == 1


async def test_a_worker_that_holds_the_newest_version_is_woken_by_the_next_post():
    board = await board_with(0)
    waiting = asyncio.create_task(board.newest(after=(0, 0), timeout_s=60))
    await asyncio.sleep(0)
    assert not waiting.done()
    await board.post(manifest(1), ["reference 1"])
    assert (await waiting).version == 1


async def test_a_wait_ends_with_none_at_its_deadline():
    board = await board_with(0)
    assert await board.newest(after=(0, 0), timeout_s=0.01) is None
    await board.post(manifest(1), ["reference 1"])
    assert (await board.newest(after=(0, 0), timeout_s=0)).version == 1


async def test_only_the_two_newest_versions_can_be_fetched():
    board = await board_with(0, 1, 2)
    assert await board.references((0, 1)) == ("reference 1",)
    assert await board.references((0, 2)) == ("reference 2",)
    with pytest.raises(LookupError, match="version 0 of the weights has been superseded; the board holds 1, 2"):
        await board.references((0, 0))


async def test_a_learner_that_resumed_makes_the_board_forget_the_future():
    board = await board_with(7, 8)
    await board.post(manifest(5), ["reference 5"])
    assert (await board.newest(after=(0, -1), timeout_s=0)).version == 5
    with pytest.raises(LookupError):
        await board.references((0, 8))


async def test_a_learner_that_went_back_is_newer_than_the_one_before_it_whatever_its_version():
    board = await board_with(7, 8)
    await board.post(manifest(5, lineage=1), ["reference 5 of 1"])
    assert (await board.newest(after=(0, 8), timeout_s=0)).stamp == (1, 5)
    assert await board.newest(after=(1, 5), timeout_s=0) is None
    assert await board.references((1, 5)) == ("reference 5 of 1",)


async def test_what_a_dead_learner_had_published_is_withdrawn_and_nobody_gets_it():
    board = await board_with(7, 8)
    await board.withdraw()
    assert await board.newest(after=(0, -1), timeout_s=0.01) is None
    with pytest.raises(LookupError, match="the board holds none"):
        await board.references((0, 8))
