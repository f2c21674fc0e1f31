"""One SQLite file, opened as the store needs it: durable, with a single writer, and with errors that name the file.

A transaction that returned is in the *log* (``X-wal``, fsynced); checkpoints copy it to the file ``X`` later on. SQLite
takes a file without its log as it is, silently in an older state. So the file itself says ``state=open`` while a log
may hold more than it does:

    open    create, or recover X-wal ▶ state=open into X-wal ▶ checkpoint: now X says it    X-wal exists from here …
    close   state=closed into X-wal ▶ checkpoint: X says it and is complete ▶ SQLite deletes X-wal        … to here

Killed at any point, X says ``open`` only if X-wal exists. The reverse, ``open`` without a log, is refused.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from replay.errors import DamagedFile, DiskFull, ReplayError
from replay.lock import NO_ROOM, StoreLock

PAGE_BYTES = 16384
"""Page size of new files: a payload is then a handful of pages instead of dozens."""
CHECKPOINT_PAGES = 2000
"""Pages in the log (32 MB) after which a commit copies them to the file."""
LOG_BYTES = 256 << 20
"""What a log that had to grow beyond that (a long reader, a full disk) is cut back to afterwards."""
CACHE_KIB = 32 << 10
"""Page cache: a transaction that fits is written to the log once, at its commit."""
_DAMAGE = (
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
)
BUSY_S = 10.0
"""How long to wait for another program that has the file locked, e.g. a checkpoint for a reader (seconds)."""

Migration = Callable[[sqlite3.Connection, Path], None]
"""Takes a file from one schema version to the next, inside a transaction, foreign keys unchecked."""


class Database:
    """A connection, to be used by one thread at a time.

    The writer runs in WAL mode with synchronous=FULL: a transaction that returned is on disk, and readers are never
    blocked. ``ReplayError`` carries the path and SQLite's own words; ``DiskFull`` if the same call may work later.
    """

    def __init__(
        self,
        path: Path,
        *,
        read_only: bool,
        tables: Sequence[str],
        schema_version: int,
        migrate: Mapping[int, Migration] | None = None,
        must_exist: bool = False,
        fill: Callable[[sqlite3.Connection], object] | None = None,
    ) -> None:
        """``tables`` are the statements of a new file, ``fill`` puts its first rows in.

        ``migrate`` holds for each older schema version the step to the next one. A missing file is made by the writer,
        unless it ``must_exist``.
        """
        self.path = path
        self.read_only = read_only
        with ExitStack() as undo:
            lock = None if read_only else StoreLock(path)
            if lock is not None:
                undo.callback(lock.release)
                if not path.exists() and not must_exist:
                    create(path, tables=tables, schema_version=schema_version, fill=fill)
            _refuse_unsound(path)
            with clear_errors(path):
                self._connection = connection = _connect(path, read_only=read_only)
                undo.callback(connection.close if lock is None else partial(_close_keeping_log, connection, path))
                found = _version_of(connection, path)
                if lock is not None and (found == schema_version or found in (migrate or {})):
                    self._be_durable()
                self._check_schema(found, tables, schema_version, migrate or {})
                if lock is not None:
                    _say(connection, "open")
            undo.pop_all()
        # Also when nobody closes it: SQLite would delete the log of a file that still says `open`.
        close = connection.close if lock is None else partial(_close_writer, connection, path, lock)
        self._close = weakref.finalize(self, close)

    def close(self) -> None:
        """Fold the log into the file and let the next writer in. May be called twice."""
        self._close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; durable when it returns."""
        with clear_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:  # not when the disk is full: then SQLite has rolled back itself
                    self._connection.execute("ROLLBACK")

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """One statement, for its ``rowcount``, or to go through its rows."""
        with clear_errors(self.path):
            return self._connection.execute(sql, values)

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """One statement per row of values."""
        with clear_errors(self.path):
            self._connection.executemany(sql, rows)

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        with clear_errors(self.path):
            return self._connection.execute(sql, values).fetchall()

    def column(self, sql: str, *values: Any) -> list[Any]:
        """The first column of all rows of a query."""
        return [row[0] for row in self.rows(sql, *values)]

    def one(self, sql: str, *values: Any) -> Any:
        """The single value of a query that always has one."""
        return self.rows(sql, *values)[0][0]

    def meta(self, key: str) -> str | None:
        """What the file notes about itself under ``key``."""
        found = self.column("SELECT value FROM meta WHERE key = ?", key)
        return found[0] if found else None

    def set_meta(self, key: str, value: str) -> None:
        """Note it; part of a transaction if there is one."""
        self.execute("INSERT OR REPLACE INTO meta (key, value) VALUES (?, ?)", (key, value))

    def file_bytes(self) -> int:
        """Size of the file and its log on disk."""
        return sum(part.stat().st_size for part in (self.path, log_of(self.path)) if part.exists())

    def problems(self) -> Iterator[str]:
        """What SQLite itself finds wrong, one sentence each. Reads the whole file."""
        for row in self.rows("PRAGMA integrity_check"):
            if row[0] != "ok":
                yield f"{self.path}: SQLite finds: {' '.join(row[0].split())}"
        for row in self.rows("PRAGMA foreign_key_check"):
            yield f"{self.path}: row {row[1]} of table {row[0]} has no row in table {row[2]}"

    def _be_durable(self) -> None:
        self.rows("PRAGMA journal_mode = WAL")
        self.rows("PRAGMA synchronous = FULL")
        self.rows(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        self.rows(f"PRAGMA journal_size_limit = {LOG_BYTES}")

    def _check_schema(self, found: int, tables: Sequence[str], wanted: int, migrate: Mapping[int, Migration]) -> None:
        if found < wanted and self.read_only:
            raise ReplayError(
                f"replay store {self.path} has schema version {found}, this version of r2vpo reads {wanted}; "
                "`r2vpo train` with --resume, on the run it belongs to, migrates it"
            )
        while found < wanted and found in migrate:
            _migrate(self._connection, self.path, found, migrate[found])
            found += 1
        if found != wanted:
            raise ReplayError(
                f"replay store {self.path} has schema version {found}, this version of r2vpo reads "
                f"{wanted}: open it with the version that wrote it, or start a new run"
            )
        missing = _names(tables) - set(self.column("SELECT name FROM sqlite_master WHERE type = 'table'"))
        if missing:
            raise ReplayError(f"{self.path} is another kind of file of a replay store: no table {sorted(missing)[0]}")


def create(
    path: Path,
    *,
    tables: Sequence[str],
    schema_version: int,
    fill: Callable[[sqlite3.Connection], object] | None = None,
) -> None:
    """Make a complete file under another name and rename it: ``path`` is never half a store."""
    if log_of(path).exists():
        raise ReplayError(
            f"replay store {path} is missing, but its log {log_of(path).name} is there: put the file back, "
            "or delete the log to start an empty store"
        )
    new = path.with_name(path.name + ".new")
    with clear_errors(path):
        try:
            for leftover in (new, new.with_name(new.name + "-journal")):
                leftover.unlink(missing_ok=True)
            connection = sqlite3.connect(new, isolation_level=None)
            try:
                connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                connection.execute("BEGIN IMMEDIATE")
                for statement in tables:
                    connection.execute(statement)
                about = {"schema_version": str(schema_version), "state": "closed"}
                connection.executemany("INSERT INTO meta (key, value) VALUES (?, ?)", about.items())
                if fill is not None:
                    fill(connection)
                connection.execute("COMMIT")
            finally:
                connection.close()
            new.rename(path)
            sync_directory(path.parent)
        except OSError as error:
            kind = DiskFull if error.errno in NO_ROOM else ReplayError
            raise kind(f"replay store {path} cannot be created: {error}") from error


def log_of(path: Path) -> Path:
    """The write-ahead log that SQLite keeps beside a file."""
    return path.with_name(path.name + "-wal")


def remove_empty_log(path: Path) -> None:
    """Remove the files that connections which only read have made beside a closed file: they cannot do so themselves.

    SQLite does it, for the last connection that could write, and under its own locks: a file that another process has
    open keeps its log. Does nothing for a file that says ``open``, or where nothing can be written.
    """
    with suppress(OSError, sqlite3.Error):
        if log_of(path).stat().st_size > 0 or _state_without_log(path) != "closed":
            return
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=0)
        state = None
        try:
            state = connection.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()
        finally:
            if state == ("closed",):
                connection.close()
            else:  # a run has begun meanwhile, whose log must outlive it
                _close_keeping_log(connection, path)


@contextmanager
def reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A plain connection to an existing file of any schema version, which leaves it as it is."""
    _refuse_unsound(path)
    with clear_errors(path):
        connection = _connect(path, read_only=True)
        try:
            yield connection
        finally:
            connection.close()


def schema_version_of(path: Path) -> int:
    """Schema version of an existing file. ``ReplayError`` if it is not a replay store."""
    with reading(path) as connection:
        return _version_of(connection, path)


def sync_directory(directory: Path) -> None:
    """Make renames in it durable. ``OSError`` if the disk refuses."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """SQLite's errors as ``ReplayError``, ``DiskFull`` or ``DamagedFile``, with the file's name."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise  # a fault of this program, not of the disk
    except sqlite3.Error as error:
        if _no_room(error, path):
            raise DiskFull(f"replay store {path}: no room to write ({error})") from error
        if _code(error) in _DAMAGE or _code(error) & 0xFF in _DAMAGE:
            raise DamagedFile(
                f"replay store {path}: {error}; restore it from a backup, or start a new run from a checkpoint"
            ) from error
        raise ReplayError(f"replay store {path}: {error}") from error


def _code(error: sqlite3.Error) -> int:
    """SQLite's extended result code, the primary one in its low byte; 0 for an error of Python's own."""
    return error.sqlite_errorcode if hasattr(error, "sqlite_errorcode") else 0


def _no_room(error: sqlite3.Error, path: Path) -> bool:
    """True if the disk is full, a quota spent or a size limit reached. SQLite calls only the first one by its name."""
    if _code(error) & 0xFF != sqlite3.SQLITE_IOERR:
        return _code(error) == sqlite3.SQLITE_FULL
    largest = max(part.stat().st_size for part in (path, log_of(path), path.parent) if part.exists())
    try:
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            os.pwrite(probe.fileno(), bytes(1 << 16), largest)
            os.fsync(probe.fileno())
    except OSError as refusal:
        return refusal.errno in NO_ROOM
    return False


def _connect(path: Path, *, read_only: bool) -> sqlite3.Connection:
    # A closed file on a disk that nobody can write needs no log, and none can be made there.
    frozen = read_only and not log_of(path).exists() and not os.access(path.parent, os.W_OK)
    options = ("?mode=ro&immutable=1" if frozen else "?mode=ro") if read_only else "?mode=rw"
    connection = sqlite3.connect(
        path.absolute().as_uri() + options,
        uri=True,
        isolation_level=None,
        timeout=BUSY_S,
        check_same_thread=False,  # the finalizer runs in the thread that happens to drop the last reference
    )
    connection.text_factory = _text
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA secure_delete = OFF")  # on in some builds: an eviction would write what it frees
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    return connection


def _text(stored: bytes) -> str:
    """Damaged text is text that does not match, not an error that hides the rows around it."""
    return stored.decode(errors="replace")


def _say(connection: sqlite3.Connection, state: str) -> None:
    """Get ``state`` into the main file, after everything that is in the log."""
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('state', ?)", (state,))
    # Held up by a reader for long, it reaches the file with a later checkpoint, as does whatever comes after it.
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def _close_writer(connection: sqlite3.Connection, path: Path, lock: StoreLock) -> None:
    """Leave a file that says `closed` and is complete, or else one that has its log."""
    try:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        _say(connection, "closed")
    except sqlite3.Error:
        _close_keeping_log(connection, path)
    else:
        connection.close()
    finally:
        lock.release()


def _close_keeping_log(connection: sqlite3.Connection, path: Path) -> None:
    """Close without SQLite folding in and deleting the log: it does not while another connection has the file open,
    and never for a connection that can only read."""
    other = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    with suppress(sqlite3.Error):
        other.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    connection.close()
    other.close()


def _refuse_unsound(path: Path) -> None:
    """``ReplayError`` for a file that is missing, empty, or says that it was open and has lost its log."""
    if not path.exists():
        raise ReplayError(f"replay store {path} is not there; check the name, or bring it back from where it was")
    if path.stat().st_size == 0:
        raise ReplayError(
            f"replay store {path} is empty (0 bytes): its content was lost; restore it from a backup, "
            "or delete it to start an empty store"
        )
    for _ in range(3):  # a writer may open or close the file between two looks
        if log_of(path).exists() or _state_without_log(path) != "open":
            return
        time.sleep(0.01)
    raise ReplayError(
        f"replay store {path} was not closed, and its log {log_of(path)} is missing: groups or steps that were written "
        "last may be lost. Put the log back; or, if it is gone for good, accept the loss by creating an empty file of "
        "that name: the prompts of lost groups are then generated again"
    )


def _state_without_log(path: Path) -> str | None:
    """What the main file itself says; ``immutable`` keeps SQLite from making a log."""
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            found = connection.execute("SELECT value FROM meta WHERE key = 'state'").fetchone()
        finally:
            connection.close()
    except sqlite3.Error:
        return None  # opening it in earnest says what is wrong
    return found and found[0]


def _version_of(connection: sqlite3.Connection, path: Path) -> int:
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    found = None
    if "meta" in tables:
        found = connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone()
    if found is None or not found[0].isdigit():
        raise ReplayError(f"{path} is not a replay store")
    return int(found[0])


def _migrate(connection: sqlite3.Connection, path: Path, version: int, migration: Migration) -> None:
    """One step, in one transaction: a crash leaves the old version."""
    connection.execute("PRAGMA foreign_keys = OFF")  # tables are replaced; has no effect inside a transaction
    connection.execute("BEGIN IMMEDIATE")
    try:
        migration(connection, path)
        connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", (str(version + 1),))
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
    connection.execute("PRAGMA foreign_keys = ON")


def _names(tables: Sequence[str]) -> set[str]:
    return {words[2] for words in map(str.split, tables) if words[1] == "TABLE"}
