"""What the disk can do to a store, and what is said about it."""

import os
import resource
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace

import pytest

from replay import database
from replay.consumption import ConsumptionLog
from replay.database import log_of
from replay.errors import DamagedFile, DiskFull, ReplayError
from replay.rows import encode_group
from replay.serialize import decode
from replay.shard import ShardStore
from tests.replay.replay_groups import make_group, make_trajectory, same

PAGE = database.PAGE_BYTES


@pytest.fixture
def path(tmp_path):
    return tmp_path / "replay" / "shard-000.sqlite3"


def append(store, *indices):
    return store.append_many([encode_group(make_group(i)) for i in indices])[1]


def large(index):
    """A group whose payload fills more than three pages, most of them with its number."""
    members = [make_trajectory(float(g), response=f"response of {index}. " * 2000) for g in range(2)]
    return replace(make_group(index), trajectories=tuple(members))


def closed_with(path, *groups):
    store = ShardStore(path)
    store.append_many([encode_group(g) for g in groups])
    store.close()


def crash(path, to):
    """What would be left of a store if its process were killed now; returns the copy's path."""
    shutil.copytree(path.parent, to, ignore=shutil.ignore_patterns("*-shm", "*.lock", "snapshot*"))
    return to / path.name


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# a log that is gone


@pytest.fixture
def crashed(path, tmp_path):
    store = ShardStore(path)
    append(store, 0, 1)
    yield crash(path, tmp_path / "crashed")
    store.close()


@pytest.mark.parametrize("read_only", [True, False])
def test_a_missing_log_is_noticed_and_named(crashed, read_only):
    log_of(crashed).unlink()
    for _ in range(2):  # also the second time: looking does not make a log
        with pytest.raises(ReplayError, match=r"not closed, and its log \S+-wal is missing: .* may be lost\. Put the"):
            ShardStore(crashed, read_only=read_only)


def test_a_log_that_is_put_back_brings_everything_back(crashed):
    log = log_of(crashed).read_bytes()
    log_of(crashed).unlink()
    with pytest.raises(ReplayError, match="is missing"):
        ShardStore(crashed)
    log_of(crashed).write_bytes(log)
    store = ShardStore(crashed)
    assert len(store.rows()) == 2
    store.close()


def test_the_loss_of_a_log_can_be_accepted(crashed):
    log_of(crashed).unlink()
    log_of(crashed).touch()
    store = ShardStore(crashed)
    assert len(store.rows()) == 0
    assert append(store, 0, 1) == [True, True]
    store.close()
    ShardStore(crashed, read_only=True).close()


def test_a_missing_consumption_log_is_noticed_too(tmp_path):
    path = tmp_path / "replay" / "consumption.sqlite3"
    log = ConsumptionLog(path)
    copy = crash(path, tmp_path / "crashed")
    log.close()
    log_of(copy).unlink()
    with pytest.raises(ReplayError, match=r"consumption\.sqlite3-wal is missing"):
        ConsumptionLog(copy)


def test_no_crash_at_any_statement_is_refused_and_no_lost_log_goes_unnoticed(path, tmp_path, monkeypatch):
    snapshots = []
    acknowledged = []
    connect = database._connect

    def traced(*args, **options):
        connection = connect(*args, **options)
        connection.set_trace_callback(lambda _: snapshots.append((keep(len(snapshots)), list(acknowledged))))
        return connection

    def keep(number):
        return crash(path, tmp_path / f"snapshot-{number}")

    with monkeypatch.context() as tracing:
        tracing.setattr(database, "_connect", traced)
        for index in (0, 1):
            store = ShardStore(path)
            append(store, index)
            acknowledged.append(index)
            store.close()
            snapshots.append((keep(len(snapshots)), list(acknowledged)))
    assert len(snapshots) > 20
    noticed = 0
    for copy, there in snapshots:
        bare = copy.parent / "bare.sqlite3"
        shutil.copy(copy, bare)
        for read_only in (True, False):
            store = ShardStore(copy, read_only=read_only)
            assert set(there) <= set(store.answered(0).tolist())
            store.close()
        try:
            store = ShardStore(bare)
        except ReplayError:
            noticed += 1
        else:
            assert set(there) <= set(store.answered(0).tolist())
            store.close()
    assert 0 < noticed < len(snapshots)


def test_a_log_without_its_file_is_not_taken_for_a_new_store(crashed):
    crashed.unlink()
    with pytest.raises(ReplayError, match=r"is missing, but its log shard-000\.sqlite3-wal is there: put"):
        ShardStore(crashed)
    assert not crashed.exists()


# damaged files


def test_a_flipped_byte_in_a_payload_is_a_problem_of_that_group(path):
    closed_with(path, large(0), large(1), large(2))
    flip(path, path.read_bytes().rindex(b"response of 1"))
    store = ShardStore(path)
    payloads, problems = store.read([1, 2, 3])
    assert [p is None for p in payloads] == [False, True, False]
    assert list(problems) == [2]
    assert problems[2].endswith("group 2 is damaged: the bytes of its payload do not match their checksum")
    assert same(decode(payloads[2]), large(2))
    assert list(store.verify()) == [problems[2]]
    store.close()


def test_a_broken_chain_of_pages_is_a_problem_of_that_group(path):
    closed_with(path, large(0), large(1), large(2))
    with sqlite3.connect(path) as db:
        chain = db.execute(
            "SELECT pageno FROM dbstat WHERE name = 'payloads' AND pagetype = 'overflow' ORDER BY pageno"
        ).fetchall()
    db.close()
    data = bytearray(path.read_bytes())
    first = (chain[0][0] - 1) * PAGE
    data[first : first + 4] = b"\xff\xff\xff\xff"  # the number of the page that follows
    path.write_bytes(data)
    store = ShardStore(path)
    payloads, problems = store.read([1, 2, 3])
    assert [p is None for p in payloads] == [True, False, False]
    assert problems[1].endswith("group 1 is damaged: database disk image is malformed")
    assert any("group 1 is damaged" in problem for problem in store.verify())
    freed = store.evict([1, 2])  # eviction does not stop at it
    assert freed == (2, 2 * len(payloads[1]))
    assert store.held()[0] == 1
    assert append(store, 7) == [True]
    store.close()


def test_verify_compares_the_rows_with_the_payloads(path):
    closed_with(path, make_group(0), make_group(1), make_group(2))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE groups SET oldest_version = 3, num_error = 1 WHERE id = 1")
        db.execute("UPDATE groups SET evicted_s = 1.0 WHERE id = 2")
        db.execute("DELETE FROM payloads WHERE group_id = 3")
    db.close()
    store = ShardStore(path, read_only=True)
    assert [problem.split(": ", 1)[1] for problem in store.verify()] == [
        "group 1 (0.0): oldest_version, num_error contradict its payload",
        "group 2 (0.1) is marked as evicted, but its payload is there",
        "group 3 is damaged: its payload is missing",
    ]
    store.close()


def test_a_truncated_file_is_named(path):
    closed_with(path, large(0), large(1))
    os.truncate(path, path.stat().st_size - 2 * PAGE)
    for read_only in (True, False):
        with pytest.raises(DamagedFile, match=r"shard-000\.sqlite3: .*malformed; restore it from a backup"):
            ShardStore(path, read_only=read_only)


@pytest.mark.parametrize("read_only", [True, False])
def test_an_empty_file_is_named_and_left_alone(path, read_only):
    path.parent.mkdir()
    path.touch()
    with pytest.raises(ReplayError, match=r"shard-000\.sqlite3 is empty \(0 bytes\): its content was lost"):
        ShardStore(path, read_only=read_only)
    assert path.stat().st_size == 0


@pytest.mark.parametrize("read_only", [True, False])
def test_a_file_that_is_no_store_is_refused_and_left_alone(path, read_only):
    path.parent.mkdir()
    path.write_text("weights, or a diary " * 100)
    other = path.with_name("other.sqlite3")
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE songs (name)")
    db.close()
    before = path.read_bytes(), other.read_bytes()
    for _ in range(2):  # a failed opening lets go of its lock
        with pytest.raises(ReplayError, match=r"shard-000\.sqlite3: file is not a database"):
            ShardStore(path, read_only=read_only)
        with pytest.raises(ReplayError, match=r"other\.sqlite3 is not a replay store"):
            ShardStore(other, read_only=read_only)
    assert (path.read_bytes(), other.read_bytes()) == before


@pytest.mark.parametrize("version", ["0", "99"])
def test_a_schema_version_of_another_time_is_refused_and_left_alone(path, version):
    closed_with(path, make_group(0))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (version,))
    db.close()
    before = path.read_bytes()
    with pytest.raises(ReplayError, match=f"has schema version {version}, this version of r2vpo reads 2: open it with"):
        ShardStore(path)
    assert path.read_bytes() == before


# disks that refuse


def in_a_namespace(mounts, program, *arguments):
    """Run Python code in a mount namespace of its own, after ``mounts``; skip where the machine has none."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no mount namespaces")
    command = f'{mounts} && exec "$0" -c "$@"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command, sys.executable, program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


READ_ONLY = """
import sys
from pathlib import Path
from replay.errors import ReplayError
from replay.shard import ShardStore
path = Path(sys.argv[1])
reader = ShardStore(path, read_only=True)
print(len(reader.rows()), list(reader.verify()))
reader.close()
try:
    ShardStore(path)
except ReplayError as error:
    print(error)
"""


def test_a_disk_that_cannot_be_written_can_be_read(path):
    closed_with(path, make_group(0))
    here = path.parent
    said = in_a_namespace(f"mount --bind {here} {here} && mount -o remount,ro,bind {here}", READ_ONLY, path)
    assert said.startswith("1 []\n")
    assert f"replay store {path} cannot be opened for writing: " in said
    assert "Read-only file system" in said


def test_a_file_that_cannot_be_written_is_named(path):
    closed_with(path, make_group(0))
    said = in_a_namespace(f"mount --bind {path} {path} && mount -o remount,ro,bind {path}", READ_ONLY, path)
    assert said.startswith("1 []\n")
    assert f"replay store {path}: attempt to write a readonly database" in said


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "replay").write_text("a file where the directory should be")
    with pytest.raises(ReplayError, match="cannot be opened for writing"):
        ShardStore(tmp_path / "replay" / "shard-000.sqlite3")


FULL_DISK = """
import sys
from pathlib import Path
from replay.errors import DiskFull
from replay.shard import ShardStore
from replay.rows import encode_group
from tests.replay.test_store_damage import large
disk = Path(sys.argv[1])
path = disk / "shard-000.sqlite3"
stored, ballast = 0, disk / "ballast"
ballast.write_bytes(bytes(6 << 20))
store = ShardStore(path)
try:
    while True:
        store.append_many([encode_group(large(stored))])
        stored += 1
except DiskFull as error:
    print(error)
assert stored > 10 and len(store.rows()) == store.stats()["groups"] == stored
store.close()  # nor can that be noted on the disk
try:
    ShardStore(path)
    print("opened")
except DiskFull as error:
    pass
ballast.unlink()
store = ShardStore(path)
assert store.append_many([encode_group(large(stored))])[1] == [True]
assert len(store.rows()) == stored + 1 and list(store.verify()) == []
store.close()
print("sound")
"""


def test_a_full_disk_loses_nothing_and_goes_on_once_there_is_room(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    said = in_a_namespace(f"mount -t tmpfs -o size=12m tmpfs {disk}", FULL_DISK, disk)
    assert f"replay store {disk}/shard-000.sqlite3: no room to write (database or disk is full)" in said
    assert said.endswith("sound\n")


def test_a_file_size_limit_counts_as_a_full_disk(path):
    store = ShardStore(path)
    append(store, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(DiskFull, match=r"shard-000\.sqlite3: no room to write"):
            append(store, *range(1, 900))
        assert store.answered(0).tolist() == [0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(append(store, *range(1, 900)))
    assert list(store.verify()) == []
    store.close()


def test_a_store_without_room_to_note_that_it_is_closed_keeps_its_log(path):
    store = ShardStore(path)
    append(store, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert log_of(path).stat().st_size > 0
    again = ShardStore(path)
    assert again.answered(0).tolist() == [0]
    again.close()


def test_a_new_store_needs_room(path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DiskFull, match=r"shard-000\.sqlite3"):
            ShardStore(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.exists()
    ShardStore(path).close()
