"""Six ways to damage a store: each must end in a clear error or a named group, and the rest must stay readable.

Every case is a process of its own, since some of them mount file systems that only they may see (``unshare``).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.replay.groups import GroupMaker
from benchmarks.table import REPOSITORY, Row, emit
from replay.config import ReplayConfig
from replay.consumption import ConsumptionLog
from replay.errors import ReplayError
from replay.local import LocalStore
from replay.rows import shard_of_key
from replay.schema import CONSUMPTION_FILE, shard_file
from replay.serialize import decode
from replay.shard import ShardStore

GROUPS = 200
SHARDS = 2
GROUPS_PER_STEP = 8
CONFIG = ReplayConfig(shards=SHARDS, sample="fresh")
MAKER = GroupMaker(num_tokens=32)


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a case ended."""

    readable: int
    """Groups that could be read afterwards."""
    expected: int
    """Groups that should be."""
    said: str
    """The error, or what was said of the group that was set aside."""
    clear: bool
    """Whether ``said`` names what is wrong."""


def measure() -> Iterator[Row]:
    for name, (case, needs_mounts) in CASES.items():
        with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
            command = [*(["unshare", "-rm"] if needs_mounts else []), sys.executable, "-m", __spec__.name]
            done = subprocess.run([*command, case.__name__, folder], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:  # what it said stands on standard error
            yield Row(f"damage: {name}: groups readable", float("nan"), f"of {GROUPS}", "the case runs", False)
            continue
        ending = Ending(**json.loads(done.stdout))
        print(f"damage: {name}: {ending.said}", file=sys.stderr)
        ok = ending.clear and ending.readable == ending.expected
        target = f"= {ending.expected}, clear error"
        yield Row(f"damage: {name}: groups readable", ending.readable, f"of {GROUPS}", target, ok)


def truncated(folder: Path) -> Ending:
    fill(folder)
    path = folder / shard_file(0)
    os.truncate(path, path.stat().st_size // 2)
    said = error_of(lambda: asyncio.run(reopened(folder)))
    return Ending(readable=readable(folder), expected=in_shard(1), said=said, clear=path.name in said)


def flipped(folder: Path) -> Ending:
    fill(folder)
    path = folder / shard_file(0)
    with closing(ShardStore(path, shard=0, shards=SHARDS, read_only=True)) as shard:
        group_id = int(shard.rows()["id"][0])  # the first that a step takes
        quoted_key = f'\\"0.{shard.rows()["prompt_index"][0]}\\"'.encode()  # as it stands in the payload alone
    # Everywhere: pages that were rearranged keep unused copies.
    path.write_bytes(path.read_bytes().replace(quoted_key, bytes([quoted_key[0] ^ 1]) + quoted_key[1:]))

    async def sample() -> tuple[int, int]:
        store = await reopened(folder)
        batch = await store.sample(step=0, timeout_s=5.0)
        damaged = (await store.stats())["unusable"]["damaged"]
        await store.close()
        return (len(batch.groups) if batch else 0), damaged

    with closing(ShardStore(path, shard=0, shards=SHARDS, read_only=True)) as shard:
        problems = shard.read([group_id])[1]
    clear = asyncio.run(sample()) == (GROUPS_PER_STEP, 1) and f"{group_id}" in problems[group_id]
    return Ending(readable=readable(folder), expected=GROUPS - 1, said=problems[group_id], clear=clear)


def lost_wal(folder: Path) -> Ending:
    child = get_context("fork").Process(target=fill, args=(folder, True))
    child.start()
    child.join()
    wal = folder / f"{shard_file(0)}-wal"
    wal.unlink()
    said = error_of(lambda: asyncio.run(reopened(folder)))
    return Ending(readable=readable(folder), expected=in_shard(1), said=said, clear=wal.name in said)


def read_only_folder(folder: Path) -> Ending:
    fill(folder)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    said = error_of(lambda: asyncio.run(reopened(folder)))
    return Ending(readable=readable(folder), expected=GROUPS, said=said, clear="read-only" in said.lower())


def full_disk(folder: Path) -> Ending:
    """A small file system fills up under eight writers; then it grows, and everything that waited must be there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)

    async def fill_up() -> str:
        store = await reopened(folder)
        appends = asyncio.gather(*(append(store, i) for i in range(GROUPS)))
        while not (troubles := (await store.stats())["troubles"]):
            await asyncio.sleep(0.1)
        assert not appends.done()
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        assert all(await appends)
        await store.close()
        return " ".join(troubles)

    said = asyncio.run(asyncio.wait_for(fill_up(), timeout=60))
    return Ending(readable=readable(folder), expected=GROUPS, said=said, clear="full" in said)


def two_jobs(folder: Path) -> Ending:
    async def first_and_second() -> str:
        said = ""
        store = await reopened(folder)
        for i in range(GROUPS):
            assert await append(store, i)
            if i == GROUPS // 2:
                second = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", __spec__.name, "open", folder, stdout=subprocess.PIPE
                )
                said = (await second.communicate())[0].decode()
        await store.close()
        return said

    said = asyncio.run(first_and_second())
    return Ending(readable=readable(folder), expected=GROUPS, said=said.strip(), clear=str(os.getpid()) in said)


CASES: dict[str, tuple[Callable[[Path], Ending], bool]] = {
    "file cut in half": (truncated, False),
    "byte flipped in a payload": (flipped, False),
    "WAL gone after kill -9": (lost_wal, False),
    "read-only folder": (read_only_folder, True),
    "disk full, then not": (full_disk, True),
    "two jobs on one store": (two_jobs, False),
}
"""Name → the case, and whether it needs mounts."""


def fill(folder: Path, die: bool = False) -> None:
    """A store of ``GROUPS`` groups; with ``die`` the process is killed with all of them in the write-ahead logs."""
    log = ConsumptionLog(folder / CONSUMPTION_FILE, shards=SHARDS)
    shards = [ShardStore(folder / shard_file(n), shard=n, shards=SHARDS) for n in range(SHARDS)]
    for i in range(GROUPS):
        group = MAKER.encoded(i, version=0)
        shards[shard_of_key(group.key, SHARDS)].append_many([group])
    if die:
        os.kill(os.getpid(), signal.SIGKILL)
    for file in (log, *shards):
        file.close()


async def reopened(folder: Path) -> LocalStore:
    run = {"num_prompts": 1000, "groups_per_step": GROUPS_PER_STEP, "steps": 100, "seed": 0}
    store = LocalStore(folder, config=CONFIG, resume_step=0, **run)
    await store.open()
    return store


async def append(store: LocalStore, index: int) -> bool:
    group = MAKER.encoded(index, version=0)
    return await store.shards[shard_of_key(group.key, SHARDS)].append(group)


def in_shard(shard: int) -> int:
    """How many of the groups a shard holds."""
    return sum(shard_of_key(f"0.{i}", SHARDS) == shard for i in range(GROUPS))


def readable(folder: Path) -> int:
    """Groups that can be read and decoded from those shards that can be opened for reading."""
    count = 0
    for number in range(SHARDS):
        try:
            with closing(ShardStore(folder / shard_file(number), shard=number, shards=SHARDS, read_only=True)) as shard:
                payloads, _ = shard.read(shard.rows()["id"].tolist())
        except ReplayError:
            continue
        count += len({decode(payload).key for payload in payloads if payload is not None})
    return count


def error_of(work: Callable[[], object]) -> str:
    """What a person is told; empty if nothing is wrong."""
    try:
        work()
    except (ReplayError, ValueError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    if not sys.argv[1:]:
        emit(measure())
    elif sys.argv[1] == "open":
        print(error_of(lambda: asyncio.run(reopened(Path(sys.argv[2])))))
    else:
        print(json.dumps(asdict(globals()[sys.argv[1]](Path(sys.argv[2])))))
