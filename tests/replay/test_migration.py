"""Stores of schema version 1, made by its own statements, are taken to the present one without loss."""

import sqlite3

import pytest
import xxhash

from r2vpo.records import BatchPlan, Draw, Kind
from replay import migration
from replay.consumption import ConsumptionLog
from replay.database import log_of
from replay.errors import ReplayError
from replay.schema import CONSUMPTION_FILE, SHARD_TABLES, group_columns
from replay.serialize import decode, encode
from replay.shard import ShardStore
from tests.replay.replay_groups import make_group, same, unscored_group

VERSION_1 = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    """CREATE TABLE groups (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        epoch INTEGER NOT NULL,
        prompt_index INTEGER NOT NULL,
        worker TEXT NOT NULL,
        lease_version INTEGER NOT NULL,
        oldest_version INTEGER NOT NULL,
        newest_version INTEGER NOT NULL,
        num_trajectories INTEGER NOT NULL,
        num_tokens INTEGER NOT NULL,
        num_sampled_tokens INTEGER NOT NULL,
        num_with_reward INTEGER NOT NULL,
        has_signal INTEGER NOT NULL,
        reward_mean REAL,
        num_scored INTEGER NOT NULL,
        num_truncated INTEGER NOT NULL,
        num_no_verdict INTEGER NOT NULL,
        num_timeout INTEGER NOT NULL,
        num_error INTEGER NOT NULL,
        unusable TEXT,
        appended_s REAL NOT NULL
    )""",
    "CREATE INDEX groups_by_oldest_version ON groups (oldest_version, id)",
    """CREATE TABLE payloads (
        group_id INTEGER PRIMARY KEY REFERENCES groups (id),
        payload BLOB NOT NULL,
        checksum TEXT NOT NULL
    )""",
    "CREATE TABLE steps (step INTEGER PRIMARY KEY, committed_s REAL NOT NULL)",
    """CREATE TABLE consumption (
        step INTEGER NOT NULL REFERENCES steps (step),
        group_id INTEGER NOT NULL REFERENCES groups (id),
        kind TEXT NOT NULL,
        position INTEGER NOT NULL,
        PRIMARY KEY (step, group_id)
    )""",
    "CREATE INDEX consumption_by_group ON consumption (group_id, step)",
    """CREATE TABLE choice (
        position INTEGER PRIMARY KEY,
        step INTEGER NOT NULL,
        group_id INTEGER NOT NULL UNIQUE REFERENCES groups (id),
        kind TEXT NOT NULL
    )""",
    "INSERT INTO meta VALUES ('schema_version', '1')",
)
GROUPS = (
    (make_group(0), None),
    (make_group(1, rewards=(0.0, 1.0, 1.0)), None),
    (unscored_group(2), "unscored"),
    (make_group(3), "late"),
    (make_group(4, version=1, newest=2), "ahead"),
    (make_group(5, version=1), None),
)
USED = (
    "INSERT INTO steps VALUES (0, 10.0), (1, 20.0)",
    "INSERT INTO consumption VALUES (0, 2, 'fresh', 0), (0, 1, 'fresh', 1), (1, 1, 'stale', 0)",
    "INSERT INTO choice VALUES (0, 2, 6, 'fresh'), (1, 2, 1, 'stale')",
)


@pytest.fixture
def old(tmp_path):
    """A version 1 store that was not closed: its content is still in the log."""
    path = tmp_path / "shard-000.sqlite3"
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    for statement in VERSION_1:
        db.execute(statement)
    for number, (group, unusable) in enumerate(GROUPS, start=1):
        payload = encode(group)
        row = {"id": number, **group_columns(group), "unusable": unusable, "appended_s": 5.0}
        del row["reward_spread"]
        db.execute(f"INSERT INTO groups ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", list(row.values()))
        db.execute("INSERT INTO payloads VALUES (?, ?, ?)", (number, payload, xxhash.xxh3_128_hexdigest(payload)))
    for statement in USED:
        db.execute(statement)
    yield path
    db.close()


def check_shard(path):
    store = ShardStore(path)
    payloads, problems = store.read(range(1, 7))
    assert problems == {}
    assert all(same(decode(payload), group) for payload, (group, _) in zip(payloads, GROUPS, strict=True))
    assert store.rows()["reward_spread"].tolist() == pytest.approx([0.5, 4 / 9, 0.0, 0.5, 0.5, 0.5])
    assert list(store.verify()) == []
    assert (store.held()[0], sum(n for v, n in store.stats()["verdicts"].items() if v < 2)) == (6, 1)
    store.close()


def check_log(directory):
    log = ConsumptionLog(directory / CONSUMPTION_FILE, shards=1)
    fresh, stale = Kind.FRESH, Kind.STALE
    assert (log.version, log.shards) == (2, 1)
    assert log.plan(0) == BatchPlan(step=0, draws=(Draw(group_id=2, kind=fresh), Draw(group_id=1, kind=fresh)))
    assert log.plan(1) == BatchPlan(step=1, draws=(Draw(group_id=1, kind=stale, uses=1),))
    assert log.chosen() == BatchPlan(step=2, draws=(Draw(group_id=6, kind=fresh), Draw(group_id=1, kind=stale, uses=2)))
    assert log.aside() == {4: "late", 5: "ahead"}
    assert list(log.verify()) == []
    log.close()


def test_the_log_first_then_the_shard(old):
    check_log(old.parent)
    check_shard(old)
    check_log(old.parent)


def test_the_shard_first_then_the_log(old):
    check_shard(old)
    check_log(old.parent)


def test_a_migrated_shard_has_the_tables_of_a_new_one(old, tmp_path):
    ShardStore(old).close()
    ShardStore(tmp_path / "new" / "shard-000.sqlite3").close()

    def tables(path):
        db = sqlite3.connect(path)
        found = {
            (kind, name, " ".join(sql.replace('"', "").split()))
            for kind, name, sql in db.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        }
        db.close()
        return found

    assert tables(old) == tables(tmp_path / "new" / "shard-000.sqlite3")
    assert len(tables(old)) == len(SHARD_TABLES)


def test_a_crash_while_the_log_is_made_leaves_nothing(old, monkeypatch):
    def interrupted(log, shard):
        log.execute("INSERT INTO steps VALUES (0, 1.0)")
        raise KeyboardInterrupt

    with monkeypatch.context() as crash:
        crash.setattr("replay.consumption.fill_from_version_1", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ConsumptionLog(old.parent / CONSUMPTION_FILE)
    assert not (old.parent / CONSUMPTION_FILE).exists()
    check_log(old.parent)
    check_shard(old)


def test_a_crash_while_the_shard_is_migrated_leaves_the_old_one(old, monkeypatch):
    with monkeypatch.context() as crash:
        crash.setattr(migration, "_reward_spread", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ShardStore(old)
    db = sqlite3.connect(old)
    assert db.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone() == ("1",)
    assert db.execute("SELECT COUNT(unusable), COUNT(*) FROM groups").fetchone() == (3, 6)
    db.close()
    check_log(old.parent)  # made already, complete
    check_shard(old)


def test_a_damaged_payload_does_not_keep_the_others(old):
    db = sqlite3.connect(old, isolation_level=None)
    db.execute("UPDATE payloads SET payload = zeroblob(100) WHERE group_id = 2")
    db.close()
    store = ShardStore(old)
    assert store.rows()["reward_spread"].tolist() == pytest.approx([0.5, 0.0, 0.0, 0.5, 0.5, 0.5])
    assert list(store.read(range(1, 7))[1]) == [2]
    store.close()


def test_a_reader_leaves_an_old_store_alone_and_names_the_remedy(old):
    for _ in range(2):
        with pytest.raises(ReplayError, match=r"schema version 1, .* reads 2; `r2vpo train` with --resume"):
            ShardStore(old, read_only=True)
    with pytest.raises(ReplayError, match=r"consumption\.sqlite3 is not there"):
        ConsumptionLog(old.parent / CONSUMPTION_FILE, read_only=True)
    assert log_of(old).exists()
    check_log(old.parent)


def test_an_old_store_cannot_be_spread_over_shards(old):
    with pytest.raises(ValueError, match=r"replay\.shards=2, but .*shard-000.* was written with replay\.shards=1"):
        ConsumptionLog(old.parent / CONSUMPTION_FILE, shards=2)
    check_log(old.parent)
