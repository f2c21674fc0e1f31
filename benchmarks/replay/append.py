"""Durable appends against plain writes of the same bytes, turn by turn, so that both see the same disk.

A group is acknowledged once its transaction is on disk and the replay service knows of it. Plain is what no store can
beat: the payloads of as many groups as there are writers, appended to one file, then one ``fsync``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import ray

from benchmarks.replay.groups import GroupMaker
from benchmarks.table import QUICK, Row, emit, reported
from r2vpo.job.component import Component, together
from r2vpo.job.links import ListenerLink, ShardLink
from replay.actor import ReplayActor, ShardActor
from replay.config import ReplayConfig
from replay.local import LocalStore
from replay.rows import EncodedGroup
from replay.schema import shard_file

WRITERS = 8
ROUND = 256
"""Groups that are appended in one turn, and then consumed by one step, outside of the measured time."""
TOKENS = 1024
CONFIG = ReplayConfig(sample="fresh")
RUN = {"num_prompts": 1_000_000, "groups_per_step": ROUND, "steps": 1_000_000, "seed": 0}
MAKER = GroupMaker(TOKENS)
TARGET_RATE = 2000
TARGET_RATIO = 0.5


def measure(rounds: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
        ours, plain = asyncio.run(turns(Path(folder), rounds))
        yield from compared("append: 8 writers, groups of 8 x 1,024 tokens", ours, plain)
    with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
        ray.init(num_cpus=WRITERS, include_dashboard=False, log_to_driver=False)
        ours, nothing = asyncio.run(turns_through_ray(Path(folder), rounds))
        ray.shutdown()
        name = "append: the same from 8 processes, through Ray"
        yield reported(name, ROUND / median(ours), "groups/s, durable")
        yield reported(f"{name}, to an actor that does nothing", ROUND / median(nothing), "groups/s")


def compared(name: str, ours_s: Sequence[float], plain_s: Sequence[float]) -> Iterator[Row]:
    """Rows of seconds per round. The target is met by rate or by ratio: the disk decides which of the two can be."""
    print(f"{name}: {_list(ours_s)} s, plain {_list(plain_s)} s per {ROUND} groups", file=sys.stderr)
    rate, plain_rate = ROUND / median(ours_s), ROUND / median(plain_s)
    ok = rate >= TARGET_RATE or rate / plain_rate >= TARGET_RATIO
    yield Row(name, rate, "groups/s, durable", f">= {TARGET_RATE} or ratio", ok)
    yield reported(f"{name}: plain write + fsync per {WRITERS}", plain_rate, "groups/s, durable")
    yield Row(f"{name}: ratio to plain", rate / plain_rate, "of medians", f">= {TARGET_RATIO:g} or rate", ok)


async def turns(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per round of the store and of plain writes; the first round of each is left out."""
    store = LocalStore(folder, config=CONFIG, **RUN)
    await store.open()
    ours_s, plain_s = [], []
    for step in range(rounds + 1):
        groups = [MAKER.encoded(step * ROUND + i, version=step) for i in range(ROUND)]
        ours_s.append(await append_all(store, groups))
        plain_s.append(write_all(folder / "plain", groups))
        batch = await store.service.sample(step=step, timeout_s=0)
        assert batch is not None
        await store.commit(step=step, group_ids=batch.group_ids)
    await store.close()
    return ours_s[1:], plain_s[1:]


async def append_all(store: LocalStore, groups: Sequence[EncodedGroup]) -> float:
    """Seconds until all are acknowledged: ``WRITERS`` writers, each with one group under way at a time."""

    async def write(mine: Sequence[EncodedGroup]) -> None:
        for group in mine:
            assert await store.shards[0].append(group)

    began_s = time.perf_counter()
    await asyncio.gather(*(write(groups[n::WRITERS]) for n in range(WRITERS)))
    return time.perf_counter() - began_s


def write_all(path: Path, groups: Sequence[EncodedGroup]) -> float:
    """Seconds to append the payloads to a file, with one ``fsync`` per ``WRITERS`` of them."""
    began_s = time.perf_counter()
    with path.open("ab", buffering=0) as file:
        for at in range(0, len(groups), WRITERS):
            for group in groups[at : at + WRITERS]:
                file.write(group.payload)
            os.fsync(file.fileno())
    return time.perf_counter() - began_s


async def turns_through_ray(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """As ``turns``, with service and shard as actors, and every writer a process; against an actor that does nothing.

    What these calls cost without any store says how much of the time is Ray's own on this machine.
    """
    service = Component(name="replay store", actor=ReplayActor.remote(str(folder), config=CONFIG, **RUN))
    listener = ListenerLink(service)
    shard = Component(name="shard", actor=ShardActor.remote(str(folder / shard_file(0)), listener=listener))
    await service.ask("attach", 0, ShardLink(shard))
    nothing = Component(name="nothing", actor=Nothing.remote())
    links = {"shard": ShardLink(shard), "nothing": ShardLink(nothing)}
    writers = [Component(name="writer", actor=RayWriter.remote(links)) for _ in range(WRITERS)]
    took_s: dict[str, list[float]] = {name: [] for name in links}
    for step in range(rounds + 1):
        keys = [range(step * ROUND + n, (step + 1) * ROUND, WRITERS) for n in range(WRITERS)]
        await together(*(writer.ask("prepare", mine, step) for writer, mine in zip(writers, keys, strict=True)))
        for name in links:
            began_s = time.perf_counter()
            await together(*(writer.ask("write", name) for writer in writers))
            took_s[name].append(time.perf_counter() - began_s)
        plan = await service.ask("sample", step=step, timeout_s=0)
        await service.ask("commit", step=step, group_ids=plan.group_ids)
    return took_s["shard"][1:], took_s["nothing"][1:]


@ray.remote(num_cpus=0)
class Nothing:
    """Takes every group and forgets it."""

    async def append(self, group: EncodedGroup) -> bool:
        return bool(group.key)


@ray.remote(num_cpus=0)
class RayWriter:
    """A process that appends groups one after the other."""

    def __init__(self, links: dict[str, ShardLink]) -> None:
        self._links = links
        self._maker = GroupMaker(TOKENS)
        self._groups: list[EncodedGroup] = []

    async def prepare(self, indices: range, version: int) -> None:
        self._groups = [self._maker.encoded(index, version=version) for index in indices]

    async def write(self, to: str) -> None:
        for group in self._groups:
            assert await self._links[to].append(group)


def _list(seconds: Sequence[float]) -> str:
    return " ".join(f"{s:.3f}" for s in seconds)


if __name__ == "__main__":
    emit(measure(rounds=10 if QUICK else 30))
