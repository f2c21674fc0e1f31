import os
import random
import signal
import subprocess
import sys

import pytest

from replay.store import ReplayStore
from tests.replay.replay_groups import make_group, same

WRITER = "tests.replay.append_until_killed"


@pytest.mark.faults
def test_kill_9_loses_no_acknowledged_group(tmp_path):
    path = tmp_path / "store.sqlite3"
    acknowledged = []
    rng = random.Random(0)
    for _ in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-m", WRITER, path],
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )
        for _ in range(rng.randint(1, 40)):
            acknowledged.append(writer.stdout.readline().strip())
        writer.send_signal(signal.SIGKILL)
        with writer:
            acknowledged += writer.stdout.read().split("\n")[:-1]  # after the last newline: half a line at most
        assert writer.returncode == -signal.SIGKILL
    store = ReplayStore(path)
    keys = store.keys()
    assert len(acknowledged) >= 10
    assert len(set(keys)) == len(keys)
    assert set(acknowledged) <= set(keys)
    assert len(keys) % 3 == 0  # a transaction is there as a whole or not at all
    assert store.verify() == []
    assert same(store.get(store.ids(["0.0"])["0.0"]), make_group(0))
    store.close()
