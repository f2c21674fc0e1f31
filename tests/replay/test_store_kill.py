import random

import pytest

from replay.database import log_of
from replay.shard import ShardStore
from tests.replay.append_until_killed import lost, run_and_kill


@pytest.mark.faults
def test_kill_9_loses_no_acknowledged_group(tmp_path):
    path = tmp_path / "shard-000.sqlite3"
    rng = random.Random(0)
    acknowledged = []
    for _ in range(6):
        acknowledged += run_and_kill(path, rng, num_tokens=16, per_transaction=3, life_s=0.4)
    assert acknowledged
    assert lost(path, acknowledged, per_transaction=3) == []


@pytest.mark.faults
def test_after_a_kill_a_reader_sees_every_acknowledged_group(tmp_path):
    path = tmp_path / "shard-000.sqlite3"
    rng = random.Random(1)
    acknowledged = []
    while not acknowledged:
        acknowledged += run_and_kill(path, rng, num_tokens=16, per_transaction=2, life_s=0.4)
    reader = ShardStore(path, read_only=True)
    there = {f"{row['epoch']}.{row['prompt_index']}" for row in reader.rows()}
    assert set(acknowledged) <= there
    reader.close()
    assert log_of(path).exists()


@pytest.mark.faults
def test_the_check_notices_a_loss(tmp_path):
    path = tmp_path / "shard-000.sqlite3"
    ShardStore(path).close()
    assert lost(path, ["0.7"], per_transaction=1) == ["0.7 was acknowledged and is not there"]
