import pytest

from benchmarks.replay.crash import CONFIG, Findings
from benchmarks.replay.groups import GroupMaker
from replay.consumption import ConsumptionLog
from replay.rows import encode_group, shard_of_key
from replay.schema import CONSUMPTION_FILE, shard_file
from replay.serialize import decode
from replay.shard import ShardStore


@pytest.mark.parametrize("index", [7, 123_456])
def test_a_group_made_from_a_template_is_what_encoding_it_would_give(index):
    made = GroupMaker(num_tokens=32).encoded(index, version=3)
    group = decode(made.payload)
    assert (made.key, group.key) == (f"0.{index}", f"0.{index}")
    assert group.oldest_version == group.newest_version == 3
    assert group.rewards_G.sum() == 1 + index % 7
    assert encode_group(group) == made


def test_a_kill_that_loses_groups_or_commits_is_found_out(tmp_path):
    maker = GroupMaker(num_tokens=32)
    stored = maker.encoded(0, version=0)
    ConsumptionLog(tmp_path / CONSUMPTION_FILE, shards=CONFIG.shards).close()
    for shard in range(CONFIG.shards):
        store = ShardStore(tmp_path / shard_file(shard), shard=shard, shards=CONFIG.shards)
        store.append_many([stored] if shard_of_key(stored.key, CONFIG.shards) == shard else [])
        store.close()
    found = Findings()
    found.look(tmp_path, ["new 0.0", "new 0.1", "step 0"])
    assert found.lost == {"0.1"}
    assert found.lost_steps == {0}
    assert found.problems == []
    found.look(tmp_path, ["new 0.0", "error ReplayError: no"])
    assert found.new["0.0"] == 2  # acknowledged as new twice
    assert found.problems == ["error ReplayError: no"]
