import shutil
import sqlite3

import pytest

from r2vpo.records import Kind
from replay.errors import LagViolation, ReplayError
from replay.store import ReplayStore
from tests.replay.replay_groups import make_group, same, unscored_group


@pytest.fixture
def path(tmp_path):
    return tmp_path / "replay" / "shard.sqlite3"


@pytest.fixture
def store(path):
    store = ReplayStore(path)
    yield store
    store.close()


def sample(store, step, *, num_fresh=2, num_stale=0, max_lag=2, max_replay_lag=8, seed=7):
    return store.sample(
        step=step, num_fresh=num_fresh, num_stale=num_stale, max_lag=max_lag, max_replay_lag=max_replay_lag, seed=seed
    )


def train(store, step, **options):
    """Sample and commit one step; returns its batch."""
    batch = sample(store, step, **options)
    store.commit(step=step, group_ids=batch.group_ids)
    return batch


def keys_of(batch):
    return [g.group.key for g in batch.groups]


# append


def test_an_appended_group_is_read_back_as_it_was(store):
    group = make_group(5, version=3, newest=4)
    assert store.append_many([group]) == [True]
    assert same(store.get(store.ids(["0.5"])["0.5"]), group)


def test_every_commit_reaches_the_disk(store):
    assert store._db.one("PRAGMA journal_mode") == "wal"
    assert store._db.one("PRAGMA synchronous") == 2  # FULL


def test_a_second_append_of_a_key_changes_nothing(store):
    first = make_group(5, rewards=(0.0, 1.0))
    assert store.append_many([first, make_group(5, rewards=(1.0, 0.0))]) == [True, False]
    assert store.append_many([make_group(5), make_group(6)]) == [False, True]
    assert store.keys() == ["0.5", "0.6"]
    assert same(store.get(1), first)


def test_one_malformed_group_keeps_its_whole_batch_out(store):
    with pytest.raises(ValueError, match="malformed"):
        store.append_many([make_group(1), make_group("1/2")])
    assert store.keys() == []


def test_groups_are_there_after_reopening(store, path):
    store.append_many([make_group(1)])
    store.close()
    reopened = ReplayStore(path)
    assert reopened.append_many([make_group(1), make_group(2)]) == [False, True]
    reopened.close()


# sample


def test_no_batch_while_fresh_groups_are_missing(store):
    store.append_many([make_group(0), unscored_group(1)])
    assert sample(store, 0) is None
    store.append_many([make_group(2)])
    assert keys_of(sample(store, 0)) == ["0.0", "0.2"]


def test_an_unscored_group_is_kept_counted_and_never_sampled(store):
    store.append_many([unscored_group(0)])
    assert store.waiting() == {}
    assert store.stats()["unusable"] == {"unscored": 1, "late": 0, "ahead": 0}
    assert store.stats()["outcomes"]["no_verdict"] == 1
    assert same(store.get(1), unscored_group(0))


def test_the_oldest_version_is_taken_first_and_ties_by_arrival(store):
    train_two_steps_of_nothing(store)
    store.append_many([make_group(0, version=2), make_group(1, version=1), make_group(2, version=1)])
    assert keys_of(sample(store, 2)) == ["0.1", "0.2"]


def train_two_steps_of_nothing(store):
    store.append_many([make_group(i, rewards=(1.0, 1.0)) for i in range(100, 104)])
    train(store, 0)
    train(store, 1)


def test_a_sample_is_repeated_although_more_groups_arrive(store, path):
    train_two_steps_of_nothing(store)
    store.append_many([make_group(0, version=2), make_group(1, version=2)])
    first = sample(store, 2)
    store.append_many([make_group(2, version=1)])  # would come first in a new choice
    assert sample(store, 2).group_ids == first.group_ids
    store.close()
    reopened = ReplayStore(path)
    assert sample(reopened, 2).group_ids == first.group_ids
    reopened.close()


def test_stale_groups_are_consumed_ones_with_signal_within_their_lag(store):
    store.append_many(
        [
            make_group(0, version=0),
            make_group(1, version=0, rewards=(1.0, 1.0)),  # consumed, but no signal
            make_group(2, version=1),
            make_group(3, version=1),
            make_group(4, version=2),
            make_group(5, version=2),
        ]
    )
    assert store.stale_eligible(step=0, max_replay_lag=8) == []
    with pytest.raises(LagViolation):  # 0.2 has a token of the future
        sample(store, 0, num_fresh=3)
    train(store, 0)
    batch = train(store, 1, num_stale=4)
    assert [(g.group.key, g.kind, g.uses) for g in batch.groups] == [
        ("0.2", Kind.FRESH, 0),
        ("0.3", Kind.FRESH, 0),
        ("0.0", Kind.STALE, 1),
    ]
    assert store.stale_eligible(step=2, max_replay_lag=2) == [1, 3, 4]
    assert store.stale_eligible(step=3, max_replay_lag=2) == [3, 4]
    batch = sample(store, 2, num_stale=4, max_replay_lag=2)
    assert sorted(g.group_id for g in batch.groups if g.kind is Kind.STALE) == [1, 3, 4]
    assert {g.group_id: g.uses for g in batch.groups} == {5: 0, 6: 0, 1: 2, 3: 1, 4: 1}


def test_the_stale_choice_depends_on_seed_and_step_alone(store, path, tmp_path):
    store.append_many([make_group(i) for i in range(20)])
    train(store, 0, num_fresh=16)
    store.close()
    chosen = []
    for seed, extra in ((1, 0), (1, 3), (2, 0)):
        copy = tmp_path / f"copy-{seed}-{extra}.sqlite3"
        shutil.copy(path, copy)
        again = ReplayStore(copy)
        again.append_many([make_group(50 + i, version=1) for i in range(extra)])
        chosen.append(sample(again, 1, num_stale=4, seed=seed).group_ids)
        again.close()
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 6
    assert chosen[0] != chosen[2]


def test_a_fresh_group_beyond_max_lag_stops_the_run(store):
    store.append_many([make_group(i) for i in range(4)])
    train(store, 0, num_fresh=1)
    train(store, 1, num_fresh=1)
    with pytest.raises(
        LagViolation, match=r"fresh group 3 \(0\.2\) holds versions 0 to 0; at step 2 its lag .* 0 and 1"
    ):
        sample(store, 2, max_lag=1)
    assert keys_of(sample(store, 2, max_lag=2)) == ["0.2", "0.3"]


def test_only_the_next_step_can_be_sampled(store):
    store.append_many([make_group(i) for i in range(4)])
    train(store, 0)
    for step in (0, 2):
        with pytest.raises(ValueError, match=f"step {step} cannot be sampled: the next step of .* is 1"):
            sample(store, step)


# commit


def test_a_commit_raises_the_version_and_may_be_repeated(store):
    store.append_many([make_group(i) for i in range(4)])
    ids = train(store, 0).group_ids
    assert store.version == 1
    store.commit(step=0, group_ids=ids)
    assert store.version == 1
    assert store.stats()["uses"] == {"fresh": 2, "stale": 0}


@pytest.mark.parametrize("ids", [(1,), (1, 1), (1, 2, 2), (1, 2, 3), (1, 4), ()])
def test_a_commit_of_other_groups_than_were_sampled_is_refused(store, ids):
    store.append_many([make_group(i) for i in range(4)])
    sample(store, 0)
    with pytest.raises(ValueError, match=r"step 0 was sampled as groups \[1, 2\]"):
        store.commit(step=0, group_ids=ids)
    assert store.version == 0
    store.commit(step=0, group_ids=(1, 2))
    with pytest.raises(ValueError, match=r"step 0 was committed with groups \[1, 2\]"):
        store.commit(step=0, group_ids=ids)


def test_a_step_that_was_never_sampled_cannot_be_committed(store):
    store.append_many([make_group(0)])
    with pytest.raises(ValueError, match=r"step 0 was sampled as groups \[\]"):
        store.commit(step=0, group_ids=(1,))
    with pytest.raises(ValueError, match=r"step 0 was sampled as groups \[\]"):
        store.commit(step=0, group_ids=())


def test_steps_are_committed_in_order(store):
    store.append_many([make_group(i) for i in range(2)])
    batch = sample(store, 0)
    with pytest.raises(ValueError, match="step 1 cannot be committed before step 0"):
        store.commit(step=1, group_ids=batch.group_ids)


# rewind


def test_rewind_undoes_later_consumption_and_nothing_else(store):
    store.append_many([make_group(i) for i in range(6)])
    first = train(store, 0)
    second = train(store, 1)
    train(store, 2)
    assert store.rewind(1) == 0
    assert store.version == 1
    assert set(store.waiting()) == {3, 4, 5, 6}
    assert store.stale_eligible(step=1, max_replay_lag=8) == list(first.group_ids)
    assert train(store, 1).group_ids == second.group_ids
    assert len(store.keys()) == 6


def test_rewind_forgets_the_choice(store):
    train_two_steps_of_nothing(store)
    store.append_many([make_group(0, version=2), make_group(1, version=2)])
    sample(store, 2)
    store.rewind(2)
    store.append_many([make_group(2, version=1)])
    assert keys_of(sample(store, 2)) == ["0.2", "0.0"]


def test_groups_of_undone_versions_are_never_sampled_again(store):
    store.append_many([make_group(0), make_group(1), make_group(2, version=0, newest=1), make_group(3, version=1)])
    train(store, 0)
    train(store, 1)
    store.append_many([make_group(4, version=1, newest=2)])
    assert store.rewind(1) == 1
    assert set(store.waiting()) == {3, 4}  # version 1 is the checkpoint itself
    assert store.rewind(0) == 2
    assert set(store.waiting()) == {1, 2}
    assert store.stats()["unusable"]["ahead"] == 3
    assert len(store.keys()) == 5


def test_a_store_cannot_go_on_where_it_has_not_been(store):
    with pytest.raises(ValueError, match=r"knows 0 committed steps and cannot go on at step 1: checkpoint and store"):
        store.rewind(1)


# damage, locks, disks


def test_a_flipped_byte_is_found_when_the_group_is_read(store, path):
    store.append_many([make_group(0), make_group(1)])
    assert store.verify() == []
    with sqlite3.connect(path) as db:
        payload = bytearray(db.execute("SELECT payload FROM payloads WHERE group_id = 2").fetchone()[0])
        payload[len(payload) // 2] ^= 1
        db.execute("UPDATE payloads SET payload = ? WHERE group_id = 2", (bytes(payload),))
    db.close()
    store.get(1)
    with pytest.raises(ReplayError, match="payload of group 2 is damaged"):
        store.get(2)
    with pytest.raises(ReplayError, match="payload of group 2 is damaged"):
        sample(store, 0)
    assert len(store.verify()) == 1


def test_verify_compares_the_table_with_the_payloads(store, path):
    store.append_many([make_group(0)])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE groups SET oldest_version = 3")
        db.execute("INSERT INTO steps VALUES (4, 0.0)")
    db.close()
    assert store.verify() == [
        "1 committed steps, but the next one is 5: a step is missing",
        "group 1 (0.0): oldest_version contradict its payload",
    ]


def test_two_writers_of_one_store_are_refused_by_name(store, path):
    with pytest.raises(ReplayError, match=r"in use by process \d+ on .*: two runs cannot write one store"):
        ReplayStore(path)
    store.append_many([make_group(0)])
    store.close()
    ReplayStore(path).close()


def test_a_reader_sees_the_store_of_a_live_writer_and_cannot_write(store, path):
    reader = ReplayStore.read_only(path)
    store.append_many([make_group(0)])
    assert reader.keys() == ["0.0"]
    with pytest.raises(ReplayError, match="readonly database"):
        reader.append_many([make_group(1)])
    reader.close()


def test_a_closed_store_can_be_read(store, path):
    store.append_many([make_group(0)])
    store.close()
    reader = ReplayStore.read_only(path)
    assert reader.verify() == []
    reader.close()


def test_any_sqlite_tool_can_read_it(store, path):
    store.append_many([make_group(0, rewards=(0.0, 1.0, 1.0))])
    with sqlite3.connect(path) as db:
        row = db.execute("SELECT key, num_trajectories, num_tokens, has_signal, reward_mean FROM groups").fetchone()
    db.close()
    assert row == ("0.0", 3, 15, 1, pytest.approx(2 / 3))


def test_reading_a_store_that_is_not_there_names_it(path):
    with pytest.raises(ReplayError, match=r"shard\.sqlite3: unable to open database file"):
        ReplayStore.read_only(path)
    assert not path.exists()


def test_a_file_that_is_no_store_is_refused_and_left_alone(path):
    path.parent.mkdir()
    path.write_text("weights, or a diary " * 100)
    with pytest.raises(ReplayError, match="file is not a database"):
        ReplayStore(path)
    assert path.read_text() == "weights, or a diary " * 100
    other = path.with_name("other.sqlite3")
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE songs (name)")
    db.close()
    for _ in range(2):  # a failed open lets go of its lock
        with pytest.raises(ReplayError, match=r"other\.sqlite3 is not a replay store"):
            ReplayStore(other)


def test_another_schema_version_is_refused(store, path):
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    db.close()
    with pytest.raises(ReplayError, match="has schema version 99, this version of r2vpo reads 1"):
        ReplayStore(path)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(store, path):
    store.append_many([make_group(0)])
    pages = store._db.one("PRAGMA page_count")
    store._db.rows(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(ReplayError, match=r"shard\.sqlite3: database or disk is full"):
        store.append_many([make_group(i) for i in range(1, 200)])
    assert store.keys() == ["0.0"]
    store._db.rows(f"PRAGMA max_page_count = {pages + 1000}")
    assert all(store.append_many([make_group(i) for i in range(1, 200)]))
    assert store.verify() == []


def test_a_directory_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "replay").write_text("a file where the directory should be")
    with pytest.raises(ReplayError, match="cannot be opened for writing"):
        ReplayStore(tmp_path / "replay" / "shard.sqlite3")


def test_a_committed_batch_is_given_back_as_it_was_consumed(store):
    store.append_many([make_group(i, version=i // 2) for i in range(4)])
    batches = [train(store, 0), train(store, 1, num_stale=1)]
    for step, batch in enumerate(batches):
        again = store.committed_batch(step)
        assert [(g.group_id, g.kind, g.uses) for g in again.groups] == [
            (g.group_id, g.kind, g.uses) for g in batch.groups
        ]
        assert all(same(a.group, b.group) for a, b in zip(again.groups, batch.groups, strict=True))
    with pytest.raises(LookupError, match="no committed step 2"):
        store.committed_batch(2)
