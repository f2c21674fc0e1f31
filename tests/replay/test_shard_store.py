import gc
import sqlite3

import numpy as np
import pytest

from r2vpo.records import prompt_key
from replay.database import log_of
from replay.errors import ReplayError
from replay.rows import encode_group, shard_of_key
from replay.schema import GROUP_COLUMNS
from replay.serialize import decode
from replay.shard import ShardStore
from tests.replay.replay_groups import make_group, same, unscored_group


@pytest.fixture
def path(tmp_path):
    return tmp_path / "replay" / "shard-000.sqlite3"


@pytest.fixture
def store(path):
    store = ShardStore(path)
    yield store
    store.close()


def append(store, *groups):
    """Append groups; an int stands for ``make_group`` of it. Returns what was new."""
    made = [make_group(g) if isinstance(g, int) else g for g in groups]
    return store.append_many([encode_group(g) for g in made])[1]


def keys_of(rows):
    return [prompt_key(row["epoch"], row["prompt_index"]) for row in rows]


# append


def test_an_appended_group_is_read_back_as_it_was(store):
    group = make_group(5, version=3, newest=4)
    assert append(store, group) == [True]
    payloads, problems = store.read([1])
    assert same(decode(payloads[0]), group)
    assert problems == {}


def test_every_commit_reaches_the_disk(store):
    assert store._db.one("PRAGMA journal_mode") == "wal"
    assert store._db.one("PRAGMA synchronous") == 2  # FULL
    assert store._db.one("PRAGMA page_size") == 16384


def test_the_row_of_a_group_says_what_the_group_says(store):
    group = make_group("2.7", version=3, newest=4, rewards=(0.0, 1.0, 1.0, None))
    rows, _ = store.append_many([encode_group(group)])
    (row,) = rows
    assert (row["id"], row["epoch"], row["prompt_index"]) == (1, 2, 7)
    assert (row["oldest_version"], row["newest_version"]) == (3, 4)
    assert (row["num_with_reward"], row["has_signal"]) == (3, True)
    assert row["reward_spread"] == pytest.approx(4 / 9)  # mean 2/3: distances 2/3, 1/3, 1/3
    assert row["num_bytes"] == len(store.read([1])[0][0])
    assert store.rows().tolist() == rows.tolist()


def test_the_spread_of_a_single_verdict_is_zero(store):
    append(store, make_group(0, rewards=(1.0, None)), make_group(1, rewards=(None, None)))
    assert store.rows()["reward_spread"].tolist() == [0.0, 0.0]


def test_a_key_is_stored_once_and_its_first_group_stays(store):
    first, second = make_group(5, rewards=(0.0, 1.0)), make_group(5, rewards=(1.0, 0.0))
    assert append(store, first, second) == [True, False]
    rows, new = store.append_many([encode_group(second), encode_group(make_group(6))])
    assert (new, rows["id"].tolist()) == ([False, True], [1, 2])
    assert same(decode(store.read([1])[0][0]), first)


def test_ids_name_their_shard_and_go_on_after_reopening(path):
    mine = [i for i in range(40) if shard_of_key(f"0.{i}", 3) == 1][:4]
    store = ShardStore(path, shard=1, shards=3)
    append(store, *mine[:2])
    store.close()
    store = ShardStore(path, shard=1, shards=3)
    append(store, *mine[2:])
    assert store.rows()["id"].tolist() == [2, 5, 8, 11]  # local * 3 + 1 + 1
    assert list(store.verify()) == []
    store.close()


def test_a_group_of_another_shard_is_a_fault_of_the_program(path):
    other = next(i for i in range(40) if shard_of_key(f"0.{i}", 2) == 1)
    store = ShardStore(path, shard=0, shards=2)
    with pytest.raises(AssertionError, match="belongs to another shard"):
        append(store, other)
    store.close()


def test_a_file_of_another_place_is_refused_with_both_numbers(path):
    ShardStore(path, shard=0, shards=2).close()
    with pytest.raises(ValueError, match=r"is shard 0 of 2, not shard 0 of 4: open it with replay\.shards=2"):
        ShardStore(path, shard=0, shards=4)
    ShardStore(path, shard=0, shards=2).close()  # the refusal let go of it


def test_one_impossible_group_keeps_its_whole_transaction_out(store):
    broken = encode_group(make_group(2))
    broken.columns["worker"] = None
    with pytest.raises(sqlite3.IntegrityError):
        store.append_many([encode_group(make_group(1)), broken])
    assert len(store.rows()) == 0
    assert store.stats()["groups"] == 0
    assert append(store, 1) == [True]
    assert store.rows()["id"].tolist() == [1]


def test_the_list_of_columns_is_complete():
    assert set(GROUP_COLUMNS) == set(encode_group(make_group(0)).columns)


# looking things up


def test_rows_are_those_held_of_a_version_and_above_an_id_by_id(store):
    append(store, *(make_group(i, version=v) for i, v in enumerate([3, 1, 2, 3, 0])))
    store.evict([4])
    assert store.rows()["id"].tolist() == [1, 2, 3, 5]
    assert store.rows(oldest_version=2)["id"].tolist() == [1, 3]
    assert store.rows(after_id=2)["id"].tolist() == [3, 5]
    assert store.rows(oldest_version=2, after_id=1)["id"].tolist() == [3]
    assert len(store.rows(oldest_version=9)) == 0


def test_the_oldest_held_come_in_pages_by_version_then_id(store):
    append(store, *(make_group(i, version=v) for i, v in enumerate([2, 1, 2, 1, 0])))
    store.evict([5])
    first = store.oldest_held(limit=3)
    assert first["id"].tolist() == [2, 4, 1]
    last = first[-1]
    rest = store.oldest_held(limit=3, after=(int(last["oldest_version"]), int(last["id"])))
    assert rest["id"].tolist() == [3]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT id FROM groups INDEXED BY groups_held WHERE (oldest_version, id) > (1, 2) AND evicted_s IS NULL "
        "ORDER BY oldest_version, id LIMIT 5",
        "SELECT id FROM groups INDEXED BY groups_held WHERE oldest_version >= 3 AND evicted_s IS NULL",
        "SELECT id FROM groups WHERE id > 3 AND evicted_s IS NULL ORDER BY id",
        "SELECT prompt_index FROM groups WHERE epoch = 3 ORDER BY prompt_index",
    ],
)
def test_no_lookup_scans_the_table_or_sorts(store, query):
    plan = " ".join(row[3] for row in store._db.rows(f"EXPLAIN QUERY PLAN {query}"))
    assert plan.startswith("SEARCH groups")
    assert "TEMP B-TREE" not in plan


def test_evicted_prompts_stay_answered(store):
    append(store, 4, 2, make_group("1.3"))
    store.evict([1])
    assert store.epochs() == {0: 2, 1: 1}
    assert store.answered(0).tolist() == [2, 4]
    assert store.answered(0).dtype == np.int64
    assert store.answered(7).tolist() == []
    assert append(store, 4) == [False]
    assert store.find(["0.4", "9.9", "1.3"])["id"].tolist() == [1, 3]
    assert keys_of(store.find(["1.3", "0.2"])) == ["1.3", "0.2"]


# evict and count


def test_eviction_frees_what_it_says_once(store):
    append(store, 0, 1, 2)
    size = [int(n) for n in store.rows()["num_bytes"]]
    assert store.held() == (3, sum(size))
    assert store.evict([1, 3, 3, 99]) == (2, size[0] + size[2])
    assert store.evict([1]) == (0, 0)
    assert store.held() == (1, size[1])
    assert store.read([1, 2, 99])[1].keys() == {1, 99}
    assert "group 1 was evicted" in store.read([1])[1][1]
    assert "group 99 is unknown" in store.read([99])[1][99]
    assert list(store.verify()) == []


def test_the_room_of_evicted_payloads_is_used_again(store):
    append(store, *range(200))
    pages = store._db.one("PRAGMA page_count")
    store.evict(range(1, 201))
    append(store, *range(200, 390))
    assert store._db.one("PRAGMA page_count") <= pages + 3


def test_counts_are_the_same_in_memory_in_a_reader_and_after_reopening(store, path):
    append(store, 0, unscored_group(1), make_group(2, rewards=(1.0, 1.0, None)))
    store.evict([1])
    expected = {
        "groups": 3,
        "trajectories": 7,
        "sampled_tokens": 21,
        "outcomes": {"scored": 5, "truncated": 0, "no_verdict": 2, "timeout": 0, "error": 0},
        "held_groups": 2,
        "held_bytes": int(store.rows()["num_bytes"].sum()),
        "evicted": 1,
        "verdicts": {2: 2, 1: 1},
        "equal_verdicts": {2: 1, 1: 1},
    }
    reader = ShardStore(path, read_only=True)
    for each in (store, reader):
        stats = each.stats()
        assert stats.pop("file_bytes") > 16384
        assert stats == expected
        assert each.held() == (2, expected["held_bytes"])
    reader.close()
    store.close()
    again = ShardStore(path)
    assert {**again.stats(), "file_bytes": 0} == {**expected, "file_bytes": 0}
    again.close()


# readers, locks, closing


def test_two_writers_are_refused_by_name(store, path):
    with pytest.raises(ReplayError, match=r"in use by process \d+ on .+: two runs cannot write one store"):
        ShardStore(path)
    append(store, 0)
    store.close()
    ShardStore(path).close()


def test_a_reader_sees_the_store_of_a_live_writer_and_cannot_write(store, path):
    reader = ShardStore(path, read_only=True)
    append(store, 0)
    assert keys_of(reader.rows()) == ["0.0"]
    with pytest.raises(ReplayError, match="readonly database"):
        append(reader, 1)
    reader.close()
    append(store, 1)


def test_a_missing_store_is_made_only_by_a_writer_that_may(path):
    for options in ({"read_only": True}, {"must_exist": True}):
        with pytest.raises(ReplayError, match=r"shard-000\.sqlite3 is not there"):
            ShardStore(path, **options)
        assert not path.exists()
    ShardStore(path).close()
    ShardStore(path, must_exist=True).close()


def test_a_store_may_be_closed_twice_and_leaves_one_file(store, path):
    append(store, 0)
    store.close()
    store.close()
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".lock"]


def test_a_store_that_nobody_closed_can_be_opened_again(path):
    store = ShardStore(path)
    append(store, 0)
    del store
    gc.collect()
    assert not log_of(path).exists()
    again = ShardStore(path)
    assert keys_of(again.rows()) == ["0.0"]
    again.close()


def test_a_reader_that_outlives_the_writer_is_no_obstacle(store, path):
    append(store, 0)
    reader = ShardStore(path, read_only=True)
    store.close()
    assert keys_of(reader.rows()) == ["0.0"]
    again = ShardStore(path)
    append(again, 1)
    assert keys_of(reader.rows()) == ["0.0", "0.1"]
    again.close()
    reader.close()
    ShardStore(path).close()


def test_any_sqlite_tool_can_read_it(store, path):
    append(store, make_group(0, rewards=(0.0, 1.0, 1.0)))
    with sqlite3.connect(path) as db:
        row = db.execute("SELECT key, num_trajectories, num_tokens, has_signal, reward_mean FROM groups").fetchone()
    db.close()
    assert row == ("0.0", 3, 15, 1, pytest.approx(2 / 3))
