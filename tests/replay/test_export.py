import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from r2vpo.records import Outcome, TrajectoryGroup
from replay import export
from replay.export import export_parquet
from replay.reader import StoreReader
from replay.schema import shard_file
from tests.replay.replay_groups import make_group, make_trajectory
from tests.replay.stored_runs import StoredRun, keys_of_shard, tamper


@pytest.fixture
def stored(tmp_path):
    """Ids 1 to 3, two members each; 1 was trained on by steps 0 and 1, 2 is evicted."""
    folder = tmp_path / "replay"
    with StoredRun(folder) as run:
        run.append(make_group(0, version=4, newest=5), make_group(1), make_group(2, rewards=(1.0, None, 0.5)))
        run.train(0, fresh=[3])
        run.train(1, stale=[3])
        run.evict(2)
    return folder


def exported(folder, path, **options):
    with StoreReader(folder) as reader:
        return export_parquet(reader, path, **options)


def test_every_trajectory_is_a_row_with_what_became_of_its_group(stored, tmp_path):
    done = exported(stored, tmp_path / "x.parquet")
    assert (done.groups, done.trajectories, done.evicted, done.problems) == (2, 5, 1, [])
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert [(row["group_id"], row["key"], row["member"]) for row in rows] == [
        (1, "0.0", 0),
        (1, "0.0", 1),
        (3, "0.2", 0),
        (3, "0.2", 1),
        (3, "0.2", 2),
    ]
    assert [row["reward"] for row in rows] == [0.0, 1.0, 1.0, None, 0.5]
    assert rows[3]["outcome"] == "no_verdict"
    assert (rows[0]["oldest_version"], rows[0]["newest_version"]) == (4, 5)
    assert (rows[0]["uses"], rows[0]["trained_steps"]) == (0, [])
    assert (rows[2]["uses"], rows[2]["trained_steps"]) == (2, [0, 1])
    assert (rows[0]["prompt"], json.loads(rows[0]["truth"]), rows[0]["response"]) == ("6*7=", "42", "42")
    assert (rows[0]["num_tokens"], rows[0]["num_sampled_tokens"], rows[0]["worker"]) == (5, 3, "r0")
    assert "token_ids" not in rows[0]


def test_tokens_come_exactly_as_they_were_stored(stored, tmp_path):
    exported(stored, tmp_path / "x.parquet", tokens=True)
    table = pq.read_table(tmp_path / "x.parquet")
    first = make_group(0, version=4, newest=5).trajectories[0]
    for name, array in (
        ("token_ids", first.token_ids_T),
        ("loss_mask", first.loss_mask_T),
        ("behavior_logprob", first.behavior_logprob_T),
        ("version", first.version_T),
    ):
        found = table[name][0].values.to_numpy(zero_copy_only=False)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
        assert [len(cell) for cell in table[name].to_pylist()] == [5] * 5


def test_versions_of_a_row_are_those_of_its_trajectory_not_of_its_group(tmp_path):
    members = (make_trajectory(version=3), make_trajectory(version=7), make_trajectory(num_response=0))
    group = TrajectoryGroup(key="0.0", prompt="", truth=None, trajectories=members)
    with StoredRun(tmp_path / "replay") as run:
        run.append(group)
    exported(tmp_path / "replay", tmp_path / "x.parquet", tokens=True)
    table = pq.read_table(tmp_path / "x.parquet")
    assert table["oldest_version"].to_pylist() == [3, 7, None]
    assert table["newest_version"].to_pylist() == [3, 7, None]


def test_row_groups_end_at_either_limit_and_hold_everything_together(stored, tmp_path, monkeypatch):
    exported(stored, tmp_path / "rows.parquet", row_group_rows=2)
    file = pq.ParquetFile(tmp_path / "rows.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 2, 1]
    monkeypatch.setattr(export, "ROW_GROUP_TOKENS", 15)  # three trajectories of 5 tokens
    exported(stored, tmp_path / "tokens.parquet")
    file = pq.ParquetFile(tmp_path / "tokens.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 2]
    assert file.read().equals(pq.read_table(tmp_path / "rows.parquet"))


def test_shards_are_named_in_their_rows(tmp_path):
    with StoredRun(tmp_path / "replay", shards=2) as run:
        run.append(*(make_group(key) for shard in (0, 1) for key in keys_of_shard(shard, 2, 1)))
    exported(tmp_path / "replay", tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert list(zip(table["group_id"].to_pylist(), table["shard"].to_pylist(), strict=True)) == [
        (1, 0),
        (1, 0),
        (2, 1),
        (2, 1),
    ]


def test_a_damaged_group_is_left_out_and_named(stored, tmp_path):
    tamper(stored / shard_file(0), "UPDATE payloads SET payload = zeroblob(9) WHERE group_id = 1")
    done = exported(stored, tmp_path / "x.parquet")
    [problem] = done.problems
    assert "group 1" in problem
    assert pq.read_table(tmp_path / "x.parquet")["group_id"].to_pylist() == [3, 3, 3]


def test_text_that_is_no_unicode_is_written_with_question_marks(tmp_path):
    broken = make_trajectory(response="a\ud800b", outcome=Outcome.TRUNCATED)
    with StoredRun(tmp_path / "replay") as run:
        run.append(TrajectoryGroup(key="0.0", prompt="\udfff", truth={"n": [1]}, trajectories=(broken, broken)))
    exported(tmp_path / "replay", tmp_path / "x.parquet")
    row = pq.read_table(tmp_path / "x.parquet").to_pylist()[0]
    assert (row["prompt"], row["response"], json.loads(row["truth"])) == ("?", "a?b", {"n": [1]})


def test_an_empty_store_is_an_empty_table(tmp_path):
    with StoredRun(tmp_path / "replay"):
        pass
    assert exported(tmp_path / "replay", tmp_path / "x.parquet", tokens=True).trajectories == 0
    table = pq.read_table(tmp_path / "x.parquet")
    assert (table.num_rows, "token_ids" in table.column_names) == (0, True)


def test_a_file_is_replaced_only_when_asked_and_only_by_a_complete_one(stored, tmp_path, monkeypatch):
    target = tmp_path / "x.parquet"
    target.write_text("mine")
    with pytest.raises(FileExistsError):
        exported(stored, target)
    with monkeypatch.context() as patch:
        patch.setattr(export, "_table", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            exported(stored, target, overwrite=True)
    assert target.read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["replay", "x.parquet"]
    exported(stored, target, overwrite=True)
    assert pq.read_table(target).num_rows == 5
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["replay", "x.parquet"]
