from pathlib import Path

import pytest

from learner import checkpoint
from learner.checkpoint import SaveFailed
from learner.config import LearnerConfig
from r2vpo.job.checkpoints import RETRY_S, Checkpoints


class World:
    """A run with a checkpoint every 4 steps, whose disk may be full; a save takes 2 seconds."""

    def __init__(self, folder: Path, *, step: int = 0, **settings) -> None:
        self.folder, self.step, self.full, self.now_s, self.notes = folder, step, False, 100.0, []
        self.config = LearnerConfig(**{"checkpoint_every": 4, "keep_checkpoints": 2} | settings)
        self.checkpoints = Checkpoints(self.config, folder, note=self.notes.append, now=lambda: self.now_s)
        self.checkpoints.saved_step = step

    async def save(self, directory: Path) -> None:
        self.now_s += 2.0
        if self.full:
            raise SaveFailed(f"the checkpoint of version {self.step} was not written (rank 0: no space left)")
        checkpoint.begin(directory, self.step)
        checkpoint.commit(directory, self.step, {"version": self.step})
        checkpoint.prune(directory, keep=self.config.keep_checkpoints, keep_every=self.config.keep_every)

    async def train_to(self, last: int, *, step_s: float = 60.0) -> list[int]:
        """Steps after which one was due."""
        due = []
        while self.step < last:
            self.step += 1
            self.now_s += step_s
            if self.checkpoints.is_due(self.step):
                due.append(self.step)
                await self.checkpoints.write(self.step, self.save)
        return due


async def test_one_is_written_at_every_multiple_also_after_a_resume_between_two(tmp_path):
    assert await World(tmp_path / "a").train_to(12) == [4, 8, 12]
    assert await World(tmp_path / "b", step=6).train_to(12) == [8, 12]
    assert await World(tmp_path / "c", checkpoint_every=0).train_to(12) == []


async def test_the_same_step_is_not_written_twice(tmp_path):
    world = World(tmp_path)
    await world.train_to(4)
    world.full = True
    assert await world.checkpoints.write(4, world.save)
    assert world.notes == []


async def test_one_that_was_not_written_is_written_at_the_next_step_and_the_multiples_stay(tmp_path):
    world = World(tmp_path)
    await world.train_to(3)
    world.full = True
    assert await world.train_to(4) == [4]
    world.full = False
    assert await world.train_to(12) == [5, 8, 12]
    [note] = world.notes
    assert note.startswith("the checkpoint of version 4 was not written (rank 0: no space left)")
    assert note.endswith(f"; a resume would go on from the beginning: make room in {tmp_path}")


async def test_the_third_failure_in_a_row_ends_the_run_and_the_checkpoint_before_stays(tmp_path):
    world = World(tmp_path)
    await world.train_to(4)
    world.full = True
    with pytest.raises(SaveFailed, match=r"version 10 was not written.* go on from step 4: .*attempt 3 of 3"):
        await world.train_to(20)
    assert (world.step, len(world.notes)) == (10, 2)
    assert list(checkpoint.complete(tmp_path)) == [4]


async def test_after_a_failure_there_is_time_to_make_room(tmp_path):
    world = World(tmp_path)
    world.full = True
    # 4 fails; a step takes 10 s, so 5 and 6 come too early
    assert await world.train_to(7, step_s=RETRY_S / 3) == [4, 7]


async def test_what_is_kept_for_good_does_not_hold_the_store_back(tmp_path):
    world = World(tmp_path, keep_every=8)
    assert world.checkpoints.oldest_resumable == 0
    await world.train_to(20)
    assert list(checkpoint.complete(tmp_path)) == [8, 16, 20]
    assert world.checkpoints.oldest_resumable == 16
    await world.train_to(24)
    assert list(checkpoint.complete(tmp_path)) == [8, 16, 20, 24]
    assert world.checkpoints.oldest_resumable == 20


async def test_the_seconds_spent_are_told_once_failed_attempts_included(tmp_path):
    world = World(tmp_path)
    await world.train_to(8)
    assert world.checkpoints.take_spent_s() == 4.0
    world.full = True
    await world.train_to(12)
    assert world.checkpoints.take_spent_s() == 2.0
    assert world.checkpoints.take_spent_s() == 0.0
