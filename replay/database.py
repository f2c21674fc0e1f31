"""One SQLite file, opened as the store needs it: durable, with a single writer, and with errors that name the file."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from replay.errors import ReplayError
from replay.lock import StoreLock
from replay.schema import create_or_check


class Database:
    """A connection, to be used by the thread that made it.

    The writer runs in WAL mode with synchronous=FULL: a transaction that returned is on disk, and readers are never
    blocked. ``ReplayError`` carries the path and SQLite's own words.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        with ExitStack() as undo:
            self._lock = None if read_only else StoreLock(path)
            if self._lock is not None:
                undo.callback(self._lock.release)
            with self._clear_errors():
                uri = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}"
                self._connection = sqlite3.connect(uri, uri=True, isolation_level=None)
                undo.callback(self._connection.close)
                self.rows("PRAGMA foreign_keys = ON")
                if not read_only:
                    self.rows("PRAGMA journal_mode = WAL")
                    self.rows("PRAGMA synchronous = FULL")
                create_or_check(self._connection, path, may_create=not read_only)
            undo.pop_all()

    def close(self) -> None:
        """Fold the log into the file and let the next writer in. May be called twice."""
        with self._clear_errors():
            self._connection.close()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing; durable when it returns."""
        with self._clear_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:  # not when the disk is full: then SQLite has rolled back itself
                    self._connection.execute("ROLLBACK")

    def execute(self, sql: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """One statement, for its ``rowcount`` or ``lastrowid``."""
        with self._clear_errors():
            return self._connection.execute(sql, values)

    def execute_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """One statement per row of values."""
        with self._clear_errors():
            self._connection.executemany(sql, rows)

    def rows(self, sql: str, *values: Any) -> list[Any]:
        """All rows of a query."""
        with self._clear_errors():
            return self._connection.execute(sql, values).fetchall()

    def column(self, sql: str, *values: Any) -> list[Any]:
        """The first column of all rows of a query."""
        return [row[0] for row in self.rows(sql, *values)]

    def one(self, sql: str, *values: Any) -> Any:
        """The single value of a query that always has one."""
        return self.rows(sql, *values)[0][0]

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise  # a fault of this program, not of the disk
        except sqlite3.DatabaseError as error:
            raise ReplayError(f"replay store {self.path}: {error}") from error
