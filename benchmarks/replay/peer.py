"""TorchRL's replay buffer beside ours: the same groups, turn by turn, and what is left of it after kill -9.

The two promise different things, so every row says what. Ours acknowledges an append when it is on disk; TorchRL's
``LazyMemmapStorage`` returns when the operating system has it, and can be opened again as of its last ``dumps``. For a
fair comparison each is also measured as the other: TorchRL with ``dumps`` and ``fsync`` after every ``extend``, ours
in memory (``/dev/shm``). TorchRL is given what it does best: groups in batches, fixed shapes, one item per group.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from benchmarks.replay.append import ROUND, RUN, TOKENS, WRITERS, append_all
from benchmarks.replay.groups import MEMBERS, GroupMaker
from benchmarks.replay.sample import BATCH
from benchmarks.table import QUICK, REPOSITORY, Row, emit, reported
from replay.config import ReplayConfig
from replay.local import LocalStore

PINNED = Path(__file__).with_name("torchrl.txt")
INSTALLED = REPOSITORY / "build" / "torchrl"
MEMORY = Path("/dev/shm")
ROUNDS = 4 if QUICK else 8
"""Timed turns of ``ROUND`` appended groups."""
BATCHES = 20
"""Batches per turn of sampling."""
KILLS = 10 if QUICK else 40
SPREAD = [1 + i % (MEMBERS - 1) for i in range(ROUND)]
MAKER = GroupMaker(TOKENS)


def install() -> None:
    """Install the pinned packages, unless they are there. ``CalledProcessError`` if that fails."""
    stamp = INSTALLED / PINNED.name  # written last
    if not stamp.exists() or stamp.read_text() != PINNED.read_text():
        shutil.rmtree(INSTALLED, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", INSTALLED, "-r", PINNED]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        stamp.write_text(PINNED.read_text())


class TorchRL:
    """The process that runs TorchRL: ask it by the names of `peer_process.Peer`."""

    def __init__(self) -> None:
        """``CalledProcessError`` if its packages cannot be installed."""
        install()
        paths = os.pathsep.join([str(INSTALLED), str(REPOSITORY)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.replay.peer_process"],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "RL_LOGGING_LEVEL": "ERROR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: str, **settings: Any) -> Any:
        """Its answer; ``EOFError`` if it has died, which it explains on standard error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"request": request, **settings}) + "\n")
        self._process.stdin.flush()
        if not (answer := self._process.stdout.readline()):
            raise EOFError(f"the process that runs TorchRL ended during {request}")
        return json.loads(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()


@dataclass(frozen=True)
class Theirs:
    """A buffer of TorchRL under test."""

    name: str
    in_memory: bool = False
    prioritized: bool = False
    prefetch: int = 0
    dump: bool = False
    sync: bool = False


APPENDED = (
    Theirs("TorchRL memmap, extend alone (no promise)"),
    Theirs("TorchRL memmap, extend and dumps (survives a kill -9 between dumps)", dump=True),
    Theirs("TorchRL memmap, extend, dumps and fsync (durable between dumps)", dump=True, sync=True),
    Theirs("TorchRL memmap + PrioritizedSampler, extend alone (no promise)", prioritized=True),
    Theirs("TorchRL memmap in /dev/shm, extend alone (no promise)", in_memory=True),
)
SAMPLED = (
    Theirs("TorchRL memmap, RandomSampler"),
    Theirs("TorchRL memmap, RandomSampler, prefetch=3", prefetch=3),
    Theirs("TorchRL memmap, PrioritizedSampler", prioritized=True),
    Theirs("TorchRL memmap, PrioritizedSampler, prefetch=3", prioritized=True, prefetch=3),
)


def measure() -> Iterator[Row]:
    with (
        tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as disk,
        tempfile.TemporaryDirectory(prefix="r2vpo-bench-", dir=MEMORY) as memory,
        TorchRL() as torchrl,
    ):
        torchrl.ask("data", num_tokens=TOKENS, chunk=WRITERS)
        yield from rates("appended", asyncio.run(append_turns(torchrl, Path(disk), Path(memory))), ROUND)
        yield from rates("sampled", asyncio.run(sample_turns(torchrl, Path(disk))), BATCHES * BATCH)
        for dump_every, prioritized in ((0, False), (16, False), (1, False), (1, True)):
            folder = str(Path(disk) / "killed")
            yield from losses(torchrl, folder, dump_every, prioritized)


def rates(verb: str, took_s: dict[str, list[float]], groups: int) -> Iterator[Row]:
    """One row per store, from its seconds per turn of ``groups`` groups."""
    for name, seconds in took_s.items():
        yield reported(f"{verb}: {name}", groups * MEMBERS / median(seconds), "trajectories/s")


async def append_turns(torchrl: TorchRL, disk: Path, memory: Path) -> dict[str, list[float]]:
    """Seconds that every store took for each turn of ``ROUND`` groups; the first turn is left out."""
    config = ReplayConfig(sample="fresh")
    ours = {
        "R²VPO (durable)": LocalStore(disk / "ours", config=config, **RUN),
        "R²VPO, encoding included (durable)": LocalStore(disk / "encoding", config=config, **RUN),
        "R²VPO in /dev/shm (survives kill -9)": LocalStore(memory / "ours", config=config, **RUN),
    }
    for store in ours.values():
        await store.open()
    for number, theirs in enumerate(APPENDED):
        folder = str((memory if theirs.in_memory else disk) / f"appended-{number}")
        open_theirs(torchrl, theirs, folder, capacity=ROUND * (ROUNDS + 1))
    took_s: dict[str, list[float]] = {name: [] for name in (*ours, *(theirs.name for theirs in APPENDED))}
    for step in range(ROUNDS + 1):
        for name, store in ours.items():
            os.sync()  # nobody pays for what others left to be written
            took_s[name].append(await append_round(store, step, encoding="encoding" in name))
        for theirs in APPENDED:
            os.sync()
            chunks = ROUND // WRITERS
            seconds = torchrl.ask("extend", name=theirs.name, chunks=chunks, dump=theirs.dump, sync=theirs.sync)
            took_s[theirs.name].append(seconds)
    for store in ours.values():
        await store.close()
    return {name: seconds[1:] for name, seconds in took_s.items()}


async def append_round(store: LocalStore, step: int, *, encoding: bool) -> float:
    """Seconds for a turn of one of our stores; the step that consumes the groups is not counted."""
    if encoding:
        groups = [MAKER.group(f"0.{step * ROUND + i}", version=step, num_right=SPREAD[i]) for i in range(ROUND)]

        async def write(first: int) -> None:
            for group in groups[first::WRITERS]:
                assert await store.append(group)

        began_s = time.perf_counter()
        await asyncio.gather(*(write(n) for n in range(WRITERS)))
        took_s = time.perf_counter() - began_s
    else:
        took_s = await append_all(store, [MAKER.encoded(step * ROUND + i, version=step) for i in range(ROUND)])
    plan = await store.service.sample(step=step, timeout_s=0)
    assert plan is not None
    await store.commit(step=step, group_ids=plan.group_ids)
    return took_s


async def sample_turns(torchrl: TorchRL, disk: Path) -> dict[str, list[float]]:
    """Seconds that every store took for each turn of ``BATCHES`` batches; the first turn is left out."""
    ours = {f"R²VPO, {policy}, choice durable": policy for policy in ("mixed", "priority")}
    stores = {name: await filled(disk / f"sampled-{policy}", policy) for name, policy in ours.items()}
    groups = ROUND * ROUNDS
    for number, theirs in enumerate(SAMPLED):
        open_theirs(torchrl, theirs, str(disk / f"sampled-{number}"), capacity=groups)
        torchrl.ask("extend", name=theirs.name, chunks=groups // WRITERS, dump=False, sync=False)
    os.sync()
    took_s: dict[str, list[float]] = {name: [] for name in (*stores, *(theirs.name for theirs in SAMPLED))}
    for turn in range(ROUNDS + 1):
        for name, store in stores.items():
            first = FILLED_STEPS + turn * BATCHES
            took_s[name].append(sum([await sample_one(store, step) for step in range(first, first + BATCHES)]))
        for theirs in SAMPLED:
            took_s[theirs.name].append(torchrl.ask("sample", name=theirs.name, batches=BATCHES))
    for store in stores.values():
        await store.close()
    return {name: seconds[1:] for name, seconds in took_s.items()}


NUM_FRESH = ReplayConfig().num_fresh(BATCH)
FILLED_STEPS = ROUND * ROUNDS // NUM_FRESH
"""Steps that have consumed the groups a store is filled with."""


async def filled(folder: Path, policy: str) -> LocalStore:
    """A store of ``ROUND`` · ``ROUNDS`` groups, each consumed before."""
    config = ReplayConfig(sample=policy, max_replay_lag=10_000, skip_no_signal="none")
    store = LocalStore(folder, config=config, **{**RUN, "groups_per_step": BATCH})
    await store.open()
    for step in range(FILLED_STEPS):
        await sample_one(store, step)
    return store


async def sample_one(store: LocalStore, step: int) -> float:
    """Seconds for the batch of ``step`` with its decoded payloads; its new groups and its commit are not counted."""
    indices = range(step * NUM_FRESH, (step + 1) * NUM_FRESH)
    await append_all(store, [MAKER.encoded(i, version=step) for i in indices])
    began_s = time.perf_counter()
    batch = await store.sample(step=step, timeout_s=0)
    took_s = time.perf_counter() - began_s
    assert batch is not None
    await store.commit(step=step, group_ids=batch.group_ids)
    return took_s


def open_theirs(torchrl: TorchRL, theirs: Theirs, folder: str, *, capacity: int) -> None:
    torchrl.ask(
        "open",
        name=theirs.name,
        folder=folder,
        capacity=capacity,
        prioritized=theirs.prioritized,
        batch=BATCH,
        prefetch=theirs.prefetch,
    )


def losses(torchrl: TorchRL, folder: str, dump_every: int, prioritized: bool) -> Iterator[Row]:
    """What is gone after ``KILLS`` kills of a process that appends, of what ``extend`` had returned for."""
    killed: Sequence[tuple[int, int]] = torchrl.ask(
        "kill", folder=folder, kills=KILLS, dump_every=dump_every, prioritized=prioritized
    )
    appended = sum(before for before, _ in killed)
    lost = sum(max(before - after, 0) for before, after in killed)
    when = {0: "no dumps", 1: "dumps after every extend"}.get(dump_every, f"dumps after every {dump_every} extends")
    sampler = " + PrioritizedSampler" if prioritized else ""
    name = f"{KILLS} x kill -9: TorchRL memmap{sampler}, {when}"
    yield reported(f"{name}: appended and lost", lost * MEMBERS, f"of {appended * MEMBERS:,} traj.")
    refused = sum(after == 0 < before for before, after in killed)
    yield reported(f"{name}: nothing could be loaded", refused, f"of {KILLS} kills")


if __name__ == "__main__":
    emit(measure())
