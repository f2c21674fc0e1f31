"""Appends groups to the store named on the command line until somebody kills it; prints each acknowledged key."""

import sys
from pathlib import Path

from replay.store import ReplayStore
from tests.replay.replay_groups import make_group

store = ReplayStore(Path(sys.argv[1]))
start = len(store.keys())
while True:
    batch = [make_group(start + i) for i in range(3)]
    assert store.append_many(batch) == [True] * 3
    sys.stdout.write("".join(f"{group.key}\n" for group in batch))
    sys.stdout.flush()
    start += 3
