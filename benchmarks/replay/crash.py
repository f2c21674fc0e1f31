"""A whole store, appending and committing, is killed at random moments: nothing acknowledged may be missing after it.

parent ──fork──▶ child: 8 writers lease and append, a learner samples and commits; says what was acknowledged
       ──kill -9, then opens the files and looks for all of that──▶ again, on the same files
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.replay.groups import GroupMaker
from benchmarks.table import Row, at_least, at_most, emit
from replay.config import ReplayConfig
from replay.consumption import ConsumptionLog
from replay.errors import ReplayError
from replay.local import LocalStore
from replay.reader import StoreReader
from replay.rows import shard_of_key
from replay.schema import CONSUMPTION_FILE, shard_file
from replay.shard import ShardStore

KILLS = 200
LATEST_S = 0.6
"""A child lives for a random time up to this."""
VERIFY_EVERY = 20
"""Kills between two complete verifications; the looks at what was acknowledged come after every kill."""
WRITERS = 8
CONFIG = ReplayConfig(shards=2)
MAKER = GroupMaker(num_tokens=32)


class Findings:
    """What was acknowledged over all children, and what was wrong after their deaths."""

    def __init__(self) -> None:
        self.new: Counter[str] = Counter()
        """How often each key was acknowledged as new."""
        self.steps = 0
        """Steps whose commit was acknowledged."""
        self.lost: set[str] = set()
        self.lost_steps: set[int] = set()
        self.problems: list[str] = []

    def look(self, folder: Path, said: list[str]) -> None:
        """Compare the files with what a child said before it died."""
        keys = {line.split()[1] for line in said if line.startswith("new ")}
        steps = [int(line.split()[1]) for line in said if line.startswith("step ")]
        self.problems += [line for line in said if line.startswith("error ")]
        self.new.update(keys)
        self.steps = max([self.steps, *(step + 1 for step in steps)])
        try:
            self.lost |= keys - stored(folder, keys)
            if self.steps:
                self.lost_steps |= set(range(committed(folder), self.steps))
        except ReplayError as error:
            self.problems.append(f"after a kill: {error}")


def measure(kills: int) -> Iterator[Row]:
    rng, found = random.Random(0), Findings()
    with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as name:
        folder = Path(name)
        for kill in range(1, kills + 1):
            found.look(folder, run_and_kill(folder, rng.uniform(0, LATEST_S)))
            if kill % VERIFY_EVERY == 0 and found.steps:
                with StoreReader(folder) as reader:
                    found.problems += reader.verify()
                print(f"crash: {kill} kills, {len(found.new)} groups, {found.steps} steps", file=sys.stderr)
    for problem in found.problems:
        print(f"crash: {problem}", file=sys.stderr)
    label = f"{kills} x kill -9"
    yield at_least(f"{label}: groups acknowledged", len(found.new), "groups", kills)
    yield at_most(f"{label}: acknowledged groups lost", len(found.lost), "groups", 0)
    yield at_most(f"{label}: keys twice", sum(n > 1 for n in found.new.values()), "keys", 0)
    yield at_most(f"{label}: acknowledged commits lost", len(found.lost_steps), f"of {found.steps} steps", 0)
    yield at_most(f"{label}: integrity problems", len(found.problems), "problems", 0)


def run_and_kill(folder: Path, after_s: float) -> list[str]:
    """The whole lines that a writing process said until it was killed."""
    reading, writing = os.pipe()
    child = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(folder, writing))
    child.start()
    os.close(writing)
    time.sleep(after_s)
    child.kill()
    with open(reading) as pipe:
        said = pipe.read()
    child.join()
    return said.split("\n")[:-1]


def stored(folder: Path, keys: set[str]) -> set[str]:
    """Which of the keys are in the files."""
    there: set[str] = set()
    for shard in range(CONFIG.shards):
        mine = [key for key in keys if shard_of_key(key, CONFIG.shards) == shard]
        if mine:
            store = ShardStore(folder / shard_file(shard), shard=shard, shards=CONFIG.shards, read_only=True)
            there |= {f"{row['epoch']}.{row['prompt_index']}" for row in store.find(mine)}
            store.close()
    return there


def committed(folder: Path) -> int:
    """Steps that the files know as committed."""
    log = ConsumptionLog(folder / CONSUMPTION_FILE, read_only=True)
    try:
        return log.version
    finally:
        log.close()


def _write_until_killed(folder: Path, pipe: int) -> None:
    def say(line: str) -> None:
        os.write(pipe, f"{line}\n".encode())

    try:
        asyncio.run(_work(folder, say))
    except (ReplayError, ValueError) as error:
        say(f"error {type(error).__name__}: {error}")


async def _work(folder: Path, say: Callable[[str], None]) -> None:
    log = ConsumptionLog(folder / CONSUMPTION_FILE, shards=CONFIG.shards)
    step = log.version
    log.close()
    store = LocalStore(
        folder, config=CONFIG, num_prompts=100_000, groups_per_step=8, steps=1_000_000, seed=0, resume_step=step
    )
    await store.open()

    async def write(worker: str) -> None:
        while True:
            answer = await store.lease(worker=worker, stamp=(0, step), count=1, timeout_s=0.05)
            for lease in answer.leases:
                shard = store.shards[shard_of_key(lease.key, CONFIG.shards)]
                if await shard.append(MAKER.encoded(lease.index, version=lease.version)):
                    say(f"new {lease.key}")

    async def learn() -> None:
        nonlocal step
        while True:
            if (batch := await store.sample(step=step, timeout_s=1.0)) is not None:
                await store.commit(step=step, group_ids=batch.group_ids)
                say(f"step {step}")
                step += 1

    await asyncio.gather(learn(), *(write(f"worker-{n}") for n in range(WRITERS)))


if __name__ == "__main__":
    emit(measure(KILLS))
