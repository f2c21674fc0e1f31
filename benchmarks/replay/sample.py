"""Does a batch cost more when a million groups are stored than when a thousand are, and how much memory does it take?

Two stores of the same shape and different size are sampled turn by turn. A step appends its fresh groups, then plans a
batch and reads its payloads (this is what is timed), then commits. Memory and the time to open are those of a process
of its own that hosts the replay service and its shard.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from statistics import median

from benchmarks.replay.groups import GroupMaker
from benchmarks.table import QUICK, Row, at_most, emit, reported
from r2vpo.records import BatchPlan, Draw, Kind
from replay.config import ReplayConfig
from replay.consumption import ConsumptionLog
from replay.local import LocalStore
from replay.schema import CONSUMPTION_FILE, shard_file
from replay.shard import ShardStore

SMALL, LARGE = 1_000, 1_000_000
BATCH = 64
STEPS = 200
"""Timed steps per policy and store; three times as many unless QUICK."""
HOST_STEPS = 20
"""Steps that the process takes whose memory is measured."""
VERSIONS = 10
"""The groups of the stores were sampled and consumed at versions 0 to 9, in equal shares."""
CHUNK = 2_000
"""Groups per transaction while a store is filled."""
POLICIES = ("mixed", "priority")
MAKER = GroupMaker(num_tokens=32)
MAX_RATIO = 1.5
MAX_GIB = 1.0


def measure(large: int, steps: int) -> Iterator[Row]:
    sizes = {"small": SMALL, "large": large}
    with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as name:
        folders = {size: Path(name) / size for size in sizes}
        began_s = time.perf_counter()
        for size, folder in folders.items():
            fill(folder, sizes[size])
        yield reported(f"sample: {large:,} groups filled in", time.perf_counter() - began_s, "s")
        step = VERSIONS
        for policy in POLICIES:
            took_s = asyncio.run(turns(folders, policy, range(step, step + steps)))
            step += steps
            half = {size: median(both) for size, both in took_s.items()}
            label = f"sample: {policy}, batch of {BATCH}"
            yield reported(f"{label}, of {SMALL:,} stored", 1e3 * half["small"], "ms, median")
            yield reported(f"{label}, of {large:,} stored", 1e3 * half["large"], "ms, median")
            yield at_most(f"{label}: ratio of the two", half["large"] / half["small"], "of medians", MAX_RATIO)
        for policy in POLICIES:
            command = [sys.executable, "-m", "benchmarks.replay.sample", folders["large"], policy, str(step)]
            hosted = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            step += HOST_STEPS
            label = f"sample: {policy}, process that hosts {large:,} groups"
            yield reported(f"{label}: opens in", hosted["open_s"], "s")
            yield at_most(f"{label}: peak of memory", hosted["peak_gib"], "GiB", MAX_GIB)


def fill(folder: Path, num_groups: int) -> None:
    """A store of groups that were all consumed once, by steps 0 to ``VERSIONS`` - 1."""
    per_step = num_groups // VERSIONS
    folder.mkdir()
    with (
        closing(ShardStore(folder / shard_file(0))) as shard,
        closing(ConsumptionLog(folder / CONSUMPTION_FILE, shards=1)) as log,
    ):
        for step in range(VERSIONS):
            ids: list[int] = []
            for at in range(0, per_step, CHUNK):
                indices = range(step * per_step + at, step * per_step + min(at + CHUNK, per_step))
                rows, new = shard.append_many([MAKER.encoded(i, version=step) for i in indices])
                assert all(new)
                ids += rows["id"].tolist()
            log.choose(BatchPlan(step=step, draws=tuple(Draw(group_id=i, kind=Kind.FRESH) for i in ids)))
            log.commit(step=step, group_ids=ids)
            print(f"sample: {(step + 1) * per_step:,} of {num_groups:,} groups filled", file=sys.stderr)


async def turns(folders: dict[str, Path], policy: str, steps: range) -> dict[str, list[float]]:
    """Seconds that plan and payloads of each step took, by store; the stores take turns."""
    stores = {size: await opened(folder, policy, steps.start) for size, folder in folders.items()}
    took_s: dict[str, list[float]] = {size: [] for size in stores}
    for step in steps:
        for size, store in stores.items():
            took_s[size].append(await one_step(store, step))
    for store in stores.values():
        await store.close()
    return took_s


async def opened(folder: Path, policy: str, step: int) -> LocalStore:
    config = ReplayConfig(sample=policy, max_replay_lag=10_000)
    run = {"num_prompts": 10_000_000, "groups_per_step": BATCH, "steps": 1_000_000, "seed": 0}
    store = LocalStore(folder, config=config, resume_step=step, **run)
    await store.open()
    return store


async def one_step(store: LocalStore, step: int) -> float:
    """Seconds that the batch of ``step`` and its payloads took."""
    num_fresh = ReplayConfig().num_fresh(BATCH)
    first = 5_000_000 + step * num_fresh  # far from the prompts that the store was filled with
    await asyncio.gather(
        *(store.shards[0].append(MAKER.encoded(i, version=step)) for i in range(first, first + num_fresh))
    )
    began_s = time.perf_counter()
    plan = await store.service.sample(step=step, timeout_s=0)
    assert plan is not None
    assert len(plan.draws) == BATCH
    _, problems = await store.shards[0].read(plan.group_ids)
    took_s = time.perf_counter() - began_s
    assert not problems
    await store.commit(step=step, group_ids=plan.group_ids)
    return took_s


async def host(folder: Path, policy: str, step: int) -> dict[str, float]:
    """Open the store in this process, and take some steps."""
    began_s = time.perf_counter()
    store = await opened(folder, policy, step)
    open_s = time.perf_counter() - began_s
    for later in range(step, step + HOST_STEPS):
        await one_step(store, later)
    await store.stats()
    await store.close()
    return {"open_s": open_s, "peak_gib": peak_gib()}


def peak_gib() -> float:
    """The most memory (GiB, resident) that this process ever had."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise LookupError("/proc/self/status has no VmHWM")


if __name__ == "__main__":
    if sys.argv[1:]:
        folder, policy, step = sys.argv[1:]
        print(json.dumps(asyncio.run(host(Path(folder), policy, int(step)))))
    else:
        emit(measure(LARGE, STEPS if QUICK else 3 * STEPS))
