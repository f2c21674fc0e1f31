import asyncio

import pytest

from learner.board import WeightBoard
from r2vpo.records import BucketSpec, Canary, TensorSpec, WeightManifest

BUCKET = BucketSpec(tensors=(TensorSpec(name="w", dtype="float32", shape=(1,)),), num_bytes=4, checksum="")


def manifest(version):
    return WeightManifest(version=version, buckets=(BUCKET,), canary=Canary(token_ids=(), logprobs=()))


async def board_with(*versions):
    board = WeightBoard()
    for version in versions:
        await board.post(manifest(version), [f"reference {version}"])
    return board


async def test_the_newest_version_is_returned_at_once_if_it_is_newer():
    board = await board_with(0, 1)
    assert (await board.newest(after=-1, timeout_s=60)).version == 1


async def test_a_worker_that_holds_the_newest_version_is_woken_by_the_next_post():
    board = await board_with(0)
    waiting = asyncio.create_task(board.newest(after=0, timeout_s=60))
    await asyncio.sleep(0)
    assert not waiting.done()
    await board.post(manifest(1), ["reference 1"])
    assert (await waiting).version == 1


async def test_a_wait_ends_with_none_at_its_deadline():
    board = await board_with(0)
    assert await board.newest(after=0, timeout_s=0.01) is None
    await board.post(manifest(1), ["reference 1"])
    assert (await board.newest(after=0, timeout_s=0)).version == 1


async def test_only_the_two_newest_versions_can_be_fetched():
    board = await board_with(0, 1, 2)
    assert await board.references(1) == ("reference 1",)
    assert await board.references(2) == ("reference 2",)
    with pytest.raises(LookupError, match="version 0 of the weights has been superseded; the board holds 1, 2"):
        await board.references(0)


async def test_a_learner_that_resumed_makes_the_board_forget_the_future():
    board = await board_with(7, 8)
    await board.post(manifest(5), ["reference 5"])
    assert (await board.newest(after=-1, timeout_s=0)).version == 5
    with pytest.raises(LookupError):
        await board.references(8)
