import shutil
import socket
from collections import Counter
from contextlib import closing

import pytest

from r2vpo.records import Kind
from replay.consumption import ConsumptionLog
from replay.errors import ReplayError
from replay.reader import StoreReader
from replay.schema import CONSUMPTION_FILE, shard_file
from replay.shard import ShardStore
from replay.shard_view import GroupFilter
from tests.replay.replay_groups import make_group, same, unscored_group
from tests.replay.stored_runs import StoredRun, keys_of_shard, tamper

SHARD = shard_file(0)
TWO_SHARDS = dict(zip((1, 3, 2, 4), keys_of_shard(0, 2, 2) + keys_of_shard(1, 2, 2), strict=True))
"""The key of each group of ``two_shards``."""


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    """The stores of ``stored`` and ``two_shards``, built once."""
    folder = tmp_path_factory.mktemp("stores")
    with StoredRun(folder / "stored") as run:
        run.append(*(make_group(index, version=index // 2) for index in range(6)))
        run.train(0, fresh=[1, 2])
        run.train(1, fresh=[3], stale=[1])
        run.train(2, fresh=[4], stale=[1])
    with StoredRun(folder / "two", shards=2) as run:
        assert run.append(*(make_group(key) for key in TWO_SHARDS.values())) == list(TWO_SHARDS)
        run.train(0, fresh=[1, 2, 3, 4])
        run.log.set_hosts({0: socket.gethostname(), 1: "node-b"})
    return folder


@pytest.fixture
def stored(templates, tmp_path):
    """Six groups of versions 0, 0, 1, 1, 2, 2 with ids 1 to 6; steps 0 to 2 trained on [1, 2], [3, stale 1],
    [4, stale 1]."""
    return shutil.copytree(templates / "stored", tmp_path / "replay")


@pytest.fixture
def two_shards(templates, tmp_path):
    """Shard 0 holds ids 1 and 3, shard 1 ids 2 and 4; step 0 trained on all of them."""
    return shutil.copytree(templates / "two", tmp_path / "replay")


def states(reader):
    return {info.id: info.state for info in reader.newest(GroupFilter(), limit=100)}


def test_counts_are_those_of_a_store_counted_by_hand(stored):
    with StoreReader(stored) as reader:
        stats = reader.stats()
    assert (stats.version, stats.shards, stats.missing, stats.unreadable) == (3, 1, {}, {})
    assert (stats.groups, stats.trajectories, stats.sampled_tokens) == (6, 12, 36)  # 6 x 2 members x 3 tokens
    assert (stats.held_groups, stats.evicted_groups, stats.evicted_bytes) == (6, 0, 0)
    assert 0 < stats.held_bytes < stats.file_bytes
    assert (stats.oldest_version, stats.newest_version) == (0, 2)
    assert stats.outcomes == {"scored": 12, "truncated": 0, "no_verdict": 0, "timeout": 0, "error": 0}
    assert stats.trained == {"fresh": 4, "stale": 2}
    # Fresh: 1 and 2 (version 0) at step 0, 3 (1) at step 1, 4 (1) at step 2. Stale: 1 (0) at steps 1 and 2.
    assert stats.lags == {"fresh": {0: 3, 1: 1}, "stale": {1: 1, 2: 1}}
    assert stats.uses == {0: 2, 1: 3, 3: 1}
    assert {state: n for state, n in stats.states.items() if n} == {"waiting": 2, "consumed": 4}


def test_the_reward_of_a_version_is_the_mean_over_its_verdicts(tmp_path):
    with StoredRun(tmp_path) as run:
        run.append(
            make_group(0, version=0, rewards=(1.0, 1.0, 1.0)),
            make_group(1, version=0, rewards=(0.0, None, None)),
            make_group(2, version=3, rewards=(None, None)),
        )
    with StoreReader(tmp_path) as reader:
        stats = reader.stats()
    assert [(r.version, r.groups, r.verdicts, r.reward) for r in stats.rewards] == [(0, 2, 4, 0.75), (3, 1, 0, None)]
    assert (stats.no_signal, stats.unusable["unscored"]) == (1, 2)


def test_every_group_is_in_the_one_state_that_decides_about_it(tmp_path):
    with StoredRun(tmp_path) as run:
        ids = run.append(*(make_group(index) for index in range(7)), unscored_group(7))
        assert ids == [1, 2, 3, 4, 5, 6, 7, 8]
        run.train(0, fresh=[1, 2, 6])
        run.choose(1, fresh=[3])
        run.log.set_aside({4: "late", 5: "ahead", 6: "damaged", 8: "late"})
        run.evict(2)
        with StoreReader(tmp_path) as reader:
            assert states(reader) == {
                1: "consumed",
                2: "evicted",
                3: "chosen",
                4: "late",
                5: "ahead",
                6: "damaged",
                7: "waiting",
                8: "unscored",
            }
            assert sum(reader.stats().states.values()) == 8
            assert reader.stats().unusable == {"unscored": 1, "late": 2, "ahead": 1, "damaged": 1}


def test_a_late_group_that_was_trained_as_stale_is_consumed(tmp_path):
    with StoredRun(tmp_path) as run:
        run.append(make_group(0))
        run.log.set_aside({1: "late"})
        run.train(0, stale=[1])
        with StoreReader(tmp_path) as reader:
            assert states(reader) == {1: "consumed"}


def test_which_groups_are_unscored_follows_from_min_verdicts(tmp_path):
    with StoredRun(tmp_path) as run:
        run.append(*(make_group(n, rewards=(1.0,) * n + (None,)) for n in range(1, 5)))
    with StoreReader(tmp_path, min_verdicts=3) as reader:
        assert states(reader) == {1: "unscored", 2: "unscored", 3: "waiting", 4: "waiting"}
        assert (reader.stats().unusable["unscored"], reader.stats().no_signal) == (2, 2)


@pytest.mark.parametrize(
    ("which", "ids"),
    [
        (GroupFilter(), [6, 5, 4, 3, 2, 1]),
        (GroupFilter(versions=(1, 1)), [4, 3]),
        (GroupFilter(versions=(1, 7)), [6, 5, 4, 3]),
        (GroupFilter(step=1), [3, 1]),
        (GroupFilter(state="waiting"), [6, 5]),
        (GroupFilter(state="consumed", step=2, versions=(0, 0)), [1]),
        (GroupFilter(step=9), []),
    ],
)
def test_filters_narrow_the_list_and_the_count_alike(stored, which, ids):
    with StoreReader(stored) as reader:
        assert [info.id for info in reader.newest(which, limit=100)] == ids
        assert [info.id for info in reader.newest(which, limit=2)] == ids[:2]
        assert reader.count(which) == len(ids)


def test_a_group_spanning_versions_is_found_by_each_of_them(tmp_path):
    with StoredRun(tmp_path) as run:
        run.append(make_group(0, version=3, newest=5))
    with StoreReader(tmp_path) as reader:
        assert [reader.count(GroupFilter(versions=(v, v))) for v in (2, 3, 4, 5, 6)] == [0, 1, 1, 1, 0]


def test_a_group_is_found_by_id_and_by_key_with_the_steps_that_trained_on_it(stored):
    with StoreReader(stored) as reader:
        found = reader.group(1)
        assert reader.group("0.0").info == found.info
        assert found.info.trained == ((0, "fresh"), (1, "stale"), (2, "stale"))
        assert same(found.group, make_group(0))
        for unknown in (0, 7, "0.6"):
            with pytest.raises(LookupError, match=f"has no group .*{unknown}"):
                reader.group(unknown)
        with pytest.raises(ValueError, match=r"EPOCH.INDEX"):
            reader.group("zero")


def test_the_batch_of_a_step_is_given_as_it_was_then(stored):
    with StoreReader(stored) as reader:
        batch = reader.batch(1)
        assert [(g.group_id, g.kind, g.uses) for g in batch.groups] == [(3, Kind.FRESH, 0), (1, Kind.STALE, 1)]
        assert same(batch.groups[1].group, make_group(0))
        with pytest.raises(LookupError, match="step 3"):
            reader.batch(3)


def test_an_evicted_group_keeps_its_row_and_its_batch_says_what_is_gone(stored):
    with StoredRun(stored) as run:
        run.evict(1)
    with StoreReader(stored) as reader:
        found = reader.group(1)
        assert (found.group, found.info.state, len(found.info.trained)) == (None, "evicted", 3)
        assert "evicted" in found.problem
        with pytest.raises(ReplayError, match=r"batch of step 1 is incomplete: .*evicted"):
            reader.batch(1)
        assert list(reader.verify()) == []
        stats = reader.stats()
    assert (stats.held_groups, stats.evicted_groups, stats.evicted_bytes) == (5, 1, found.info.num_bytes)


def test_all_groups_come_once_shard_by_shard(two_shards):
    with StoreReader(two_shards) as reader:
        assert [(s.info.id, s.group.key) for s in reader.groups()] == list(TWO_SHARDS.items())
        assert [info.id for info in reader.newest(GroupFilter(), limit=3)] == [4, 3, 2]


def test_more_groups_than_a_page_come_once_each(tmp_path, monkeypatch):
    monkeypatch.setattr("replay.reader.PAGE", 3)
    with StoredRun(tmp_path) as run:
        run.append(*(make_group(index) for index in range(7)))
    with StoreReader(tmp_path) as reader:
        assert [stored.info.id for stored in reader.groups()] == [1, 2, 3, 4, 5, 6, 7]


def test_a_shard_on_another_host_is_named_and_the_rest_is_read(two_shards):
    (two_shards / shard_file(1)).unlink()
    with StoreReader(two_shards) as reader:
        assert reader.missing == {1: "node-b"}
        assert reader.gaps == ["shard 1 of 2 is not here: shard-001.sqlite3 lies on host node-b"]
        assert states(reader) == {1: "consumed", 3: "consumed"}
        stats = reader.stats()
        assert (stats.groups, stats.uses, stats.lags["fresh"]) == (2, {0: 0, 1: 2}, {0: 2})
        with pytest.raises(ReplayError, match=r"group 2 cannot be read: .*host node-b"):
            reader.group(2)
        with pytest.raises(ReplayError, match=r"group 2 cannot be read: .*group 4 cannot be read"):
            reader.batch(0)
        assert list(reader.verify()) == []


def test_a_shard_that_should_lie_here_and_does_not_is_a_problem(two_shards):
    (two_shards / shard_file(0)).unlink()
    with StoreReader(two_shards) as reader:
        [problem] = reader.verify()
    assert "shard-000.sqlite3 is missing" in problem


def test_a_shard_that_cannot_be_opened_does_not_hide_the_others(two_shards):
    (two_shards / shard_file(0)).write_bytes(b"no database" * 1000)
    with StoreReader(two_shards) as reader:
        assert states(reader) == {2: "consumed", 4: "consumed"}
        [problem] = reader.gaps
        assert "shard-000.sqlite3" in problem
        assert list(reader.verify()) == [problem]


def test_a_folder_without_a_readable_store_is_refused(tmp_path, stored):
    with pytest.raises(ReplayError, match="nothing holds no replay store"):
        StoreReader(tmp_path / "nothing")
    (stored / SHARD).write_bytes(b"no database" * 1000)
    with pytest.raises(ReplayError, match=SHARD):
        StoreReader(stored)


def test_shards_without_their_log_are_refused_by_its_name(stored):
    (stored / CONSUMPTION_FILE).unlink()
    with pytest.raises(ReplayError, match=rf"{CONSUMPTION_FILE} is missing"):
        StoreReader(stored)


def test_a_sound_store_verifies_within_its_bounds(stored):
    said = []
    with StoreReader(stored) as reader:
        assert list(reader.verify(max_lag=1, max_replay_lag=2, progress=said.append)) == []
    assert [what.split(" ")[1] for what in said] == [CONSUMPTION_FILE, SHARD, "the"]


def test_what_was_trained_outside_the_bounds_is_found(stored):
    with StoreReader(stored) as reader:
        assert list(reader.verify(max_lag=0, max_replay_lag=1)) == [
            "step 2 trained on fresh group 4 (0.3) of versions 1 to 1: lag 1 is above replay.max_lag=0",
            "step 2 trained on stale group 1 (0.0) of versions 0 to 0: lag 2 is above replay.max_replay_lag=1",
        ]


def test_a_version_that_did_not_exist_yet_is_found_without_bounds(tmp_path):
    with StoredRun(tmp_path) as run:
        run.append(make_group(0, version=0, newest=1))
        run.train(0, fresh=[1])
    with StoreReader(tmp_path) as reader:
        [problem] = reader.verify()
    assert problem == "step 0 trained on fresh group 1 (0.0) of versions 0 to 1: version 1 did not exist yet"


def test_a_damaged_payload_is_one_problem_of_one_group(stored):
    tamper(stored / SHARD, "UPDATE payloads SET payload = zeroblob(length(payload)) WHERE group_id = 3")
    with StoreReader(stored) as reader:
        [problem] = reader.verify()
        assert "group 3" in problem
        found = reader.group(3)
        assert found.group is None
        assert "group 3" in found.problem
        assert reader.group(4).group is not None


def test_what_the_log_names_and_no_shard_holds_is_found(stored):
    tamper(stored / SHARD, "DELETE FROM payloads WHERE group_id IN (4, 5, 6)")
    tamper(stored / SHARD, "DELETE FROM groups WHERE id IN (4, 5, 6)")
    with StoredRun(stored) as run:
        run.choose(3, fresh=[5])
        run.log.set_aside({6: "late"})
    with StoreReader(stored) as reader:
        assert list(reader.verify()) == [
            f"step 2 trained on group 4, which {SHARD} does not hold",
            f"step 3 has chosen group 5, which {SHARD} does not hold",
            f"group 6 is set aside as late, but {SHARD} does not hold it",
        ]


def test_a_chosen_group_without_its_payload_is_found(stored):
    with StoredRun(stored) as run:
        run.choose(3, fresh=[5])
        run.evict(5)
    with StoreReader(stored) as reader:
        assert list(reader.verify()) == ["step 3 has chosen group 5 (0.4), whose payload is evicted"]


def test_a_prompt_with_groups_in_two_shards_is_found(two_shards):
    index = int(TWO_SHARDS[1].split(".")[1])
    tamper(two_shards / shard_file(1), "UPDATE groups SET key = ?, prompt_index = ? WHERE id = 2", TWO_SHARDS[1], index)
    with StoreReader(two_shards) as reader:
        problems = list(reader.verify())
    assert problems[-1] == f"prompt {TWO_SHARDS[1]} has a group in more than one shard"


def test_a_reader_beside_the_writers_sees_what_they_committed_and_leaves_their_files_alone(tmp_path):
    with StoredRun(tmp_path) as run:
        run.append(make_group(0))
        with StoreReader(tmp_path) as reader:
            run.append(make_group(1))
            run.train(0, fresh=[1, 2])
            assert states(reader) == {1: "consumed", 2: "consumed"}
            assert reader.version == 1
            assert list(reader.verify()) == []
        run.append(make_group(2))
        with StoreReader(tmp_path) as reader:
            assert states(reader) == {1: "consumed", 2: "consumed", 3: "waiting"}


def test_a_group_evicted_between_its_row_and_its_payload_is_evicted_not_damaged(tmp_path):
    with StoredRun(tmp_path) as run:
        run.append(make_group(0))
        with StoreReader(tmp_path) as reader:
            rows = reader.newest(GroupFilter(), limit=1)
            run.evict(1)
            [found] = reader.read(rows)
    assert (rows[0].state, found.info.state, found.group) == ("waiting", "evicted", None)


def test_a_group_evicted_while_the_store_is_verified_is_no_problem(stored):
    tamper(stored / SHARD, "UPDATE payloads SET payload = zeroblob(9) WHERE group_id = 1")
    with StoredRun(stored) as run, StoreReader(stored) as reader:
        problems = reader.verify()
        assert "group 1 is damaged" in next(problems)  # all rows have been read, and no payload behind it
        run.evict(2)
        assert list(problems) == []


def test_steps_that_are_committed_while_the_log_is_verified_are_no_problem(stored):
    with StoredRun(stored) as run, closing(ConsumptionLog(stored / CONSUMPTION_FILE, read_only=True)) as log:

        def go_on(sql):
            version = run.log.version
            run.train(version, stale=[1])
            run.choose(version + 1, stale=[1])

        log._db._connection.set_trace_callback(go_on)  # before each of the reader's queries
        assert list(log.verify()) == []
        log._db._connection.set_trace_callback(None)
        assert log.version > 3 + 3


@pytest.mark.parametrize(
    ("rule", "waits", "late"),
    [("none", "waiting", "late"), ("stale", "waiting", "skipped"), ("all", "skipped", "skipped")],
)
def test_what_is_never_drawn_for_want_of_signal_is_skipped(tmp_path, rule, waits, late):
    with StoredRun(tmp_path) as run:
        run.append(*(make_group(index, rewards=(1.0, 1.0)) for index in range(3)))
        run.append(make_group(3), make_group(4), unscored_group(5))
        run.train(0, fresh=[1])
        run.log.set_aside({3: "late", 5: "late"})
    with StoreReader(tmp_path, skip_no_signal=rule) as reader:
        expected = {1: "consumed", 2: waits, 3: late, 4: "waiting", 5: "late", 6: "unscored"}
        assert states(reader) == expected
        counted = {name: count for name, count in reader.stats().states.items() if count}
        assert counted == Counter(expected.values())
        skipped = [i for i, state in expected.items() if state == "skipped"]
        assert reader.count(GroupFilter(state="skipped")) == len(skipped)
        assert [info.id for info in reader.newest(GroupFilter(state="skipped"), limit=9)] == sorted(skipped)[::-1]


@pytest.mark.parametrize(("gone", "named", "end"), [(5, 5, "5 was evicted"), (12, 5, "5 was evicted and 7 more")])
def test_of_many_groups_that_cannot_be_read_a_few_are_named(tmp_path, gone, named, end):
    ids = list(range(1, gone + 1))
    with StoredRun(tmp_path) as run:
        run.append(*(make_group(index) for index in range(gone)))
        run.train(0, fresh=ids)
        for group_id in ids:
            run.evict(group_id)
    with StoreReader(tmp_path) as reader, pytest.raises(ReplayError) as failure:
        reader.batch(0)
    assert str(failure.value).count("was evicted") == named
    assert str(failure.value).endswith(end)


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_reading_changes_no_file_and_leaves_none(stored):
    before = contents(stored)
    with StoreReader(stored) as reader:
        reader.stats()
        assert list(reader.verify()) == []
        assert len(list(reader.groups())) == 6
    assert contents(stored) == before


def test_the_last_of_several_readers_leaves_no_file(stored):
    before = contents(stored)
    with StoreReader(stored) as last:
        with StoreReader(stored) as first:
            first.stats()
        assert last.stats().groups == 6
        assert contents(stored) != before, "SQLite keeps files beside those that are open"
    assert contents(stored) == before


def test_a_reader_that_fails_leaves_no_file(two_shards):
    for shard in range(2):
        (two_shards / shard_file(shard)).write_bytes(b"no database" * 1000)
    before = contents(two_shards)
    with pytest.raises(ReplayError):
        StoreReader(two_shards)
    assert contents(two_shards) == before


def test_a_run_that_begins_while_it_is_read_keeps_its_logs(stored):
    reader = StoreReader(stored)
    reader.stats()
    with StoredRun(stored) as run:
        run.append(make_group(6))
        reader.close()
        assert (stored / f"{SHARD}-wal").exists()
        run.append(make_group(7))
    with StoreReader(stored) as again:
        assert again.stats().groups == 8


@pytest.mark.parametrize("groups", [0, 1])
def test_the_log_of_a_run_that_was_killed_stays_even_if_it_is_empty(tmp_path, stored, groups):
    with StoredRun(stored) as run:
        run.append(*(make_group(6 + index) for index in range(groups)))
        killed = shutil.copytree(stored, tmp_path / "killed")
    assert ((killed / f"{SHARD}-wal").stat().st_size > 0) == (groups > 0)
    before = {name: content for name, content in contents(killed).items() if not name.endswith("-shm")}
    for _ in range(2):
        with StoreReader(killed) as reader:
            assert reader.stats().groups == 6 + groups
    assert {name: content for name, content in contents(killed).items() if not name.endswith("-shm")} == before


def test_shards_without_their_log_are_named_however_many_there_are(tmp_path):
    for shard in range(2):
        ShardStore(tmp_path / f"shard-00{shard}.sqlite3", shard=shard, shards=2).close()
    with pytest.raises(ReplayError, match=r"consumption\.sqlite3 is missing"):
        StoreReader(tmp_path)
