"""A process that appends to a shard until it is killed, and the parent that kills it and looks at what is left.

Run as a module it is the child: it opens the shard, appends some transactions, closes it, and begins again, so that the
kill may come at any of these; it prints a line once it is about to begin, and each key once it is acknowledged.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from r2vpo.records import TrajectoryGroup
from replay.rows import encode_group
from replay.shard import ShardStore
from tests.replay.replay_groups import make_group, make_trajectory

OPENINGS = 20
"""Transactions between two openings of the shard in the child."""


def group_of(index: int, *, num_tokens: int) -> TrajectoryGroup:
    """Eight trajectories of ``num_tokens`` tokens each."""
    members = tuple(make_trajectory(float(g % 2), num_response=num_tokens - 2) for g in range(8))
    return replace(make_group(index), trajectories=members)


def append_for_ever(path: Path, *, num_tokens: int, per_transaction: int) -> None:
    """The child. Goes on with the index after the newest in the shard."""
    _say("ready")
    while True:
        store = ShardStore(path)
        start = store.stats()["groups"]
        for _ in range(OPENINGS):
            batch = [encode_group(group_of(start + i, num_tokens=num_tokens)) for i in range(per_transaction)]
            assert store.append_many(batch)[1] == [True] * per_transaction
            _say(*(group.key for group in batch))
            start += per_transaction
        store.close()


def run_and_kill(path: Path, rng: random.Random, *, num_tokens: int, per_transaction: int, life_s: float) -> list[str]:
    """Start a child, kill it at a random moment within ``life_s`` seconds, and return the keys it was acknowledged."""
    arguments = [str(path), str(num_tokens), str(per_transaction)]
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.replay.append_until_killed", *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        # The pipe holds what the child says in the meantime, and slows it down once it is full.
        time.sleep(rng.uniform(0.0, life_s))
        child.send_signal(signal.SIGKILL)
        lines = child.stdout.read().split("\n")[:-1]  # after the last newline: half a line at most
    assert child.returncode == -signal.SIGKILL
    return lines


def lost(path: Path, acknowledged: list[str], *, per_transaction: int) -> list[str]:
    """What is wrong with the shard after the kill, one sentence each; nothing if all is well."""
    store = ShardStore(path)
    try:
        wrong = [f"{key} was acknowledged and is not there" for key in set(acknowledged) - _keys(store)]
        if store.stats()["groups"] % per_transaction:
            wrong.append("a transaction is there in part")
        if len(_keys(store)) != store.stats()["groups"]:
            wrong.append("a key is there twice")
        return wrong + list(store.verify())
    finally:
        store.close()


def _keys(store: ShardStore) -> set[str]:
    return {f"{row['epoch']}.{row['prompt_index']}" for row in store.rows()}


def _say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


if __name__ == "__main__":
    append_for_ever(Path(sys.argv[1]), num_tokens=int(sys.argv[2]), per_transaction=int(sys.argv[3]))
