"""What a run leaves on disk, and who may write there.

    runs/NAME/  config.yaml   the resolved settings
                metrics.jsonl one object per learner step
                summary.json  the result
                status.json   what every component does, about once a second while the run goes on
                replay/  checkpoints/  logs/  model/       replay may lead elsewhere (replay.directory)
                control/      commands to the driver, and its answers (mailbox.py)
                lock          held (flock) by the process that runs it

A name is taken by the `mkdir` itself, so two processes can never share one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from r2vpo.job.settings import ConfigError

LOCK_TRIES = 5
LOCK_PAUSE_S = 0.1
"""A look at the lock (`RunDir.runner`) holds it for a moment; a driver that comes just then tries again."""


class RunDirError(ConfigError):
    """The folder of the run cannot be taken."""


class RunDir:
    """The folder of one run. The process that created or opened it holds its lock until ``close``."""

    def __init__(self, path: Path) -> None:
        """The folder ``path``, neither created nor locked; for reading."""
        self.path = path
        self._lock: int | None = None

    @classmethod
    def create(cls, root: Path, name: str) -> RunDir:
        """Take a new name. Raises ``RunDirError`` if it is occupied or the folder cannot be made."""
        run = cls(root / name)
        try:
            root.mkdir(parents=True, exist_ok=True)
            run.path.mkdir()
        except FileExistsError:
            raise occupied(run.path) from None
        except OSError as error:
            raise RunDirError(f"run_dir={root}: cannot make {run.path}: {error.strerror}") from None
        run._acquire()
        for folder in (run.replay, run.checkpoints, run.logs, run.control):
            folder.mkdir()
        return run

    @classmethod
    def create_next(cls, root: Path, stem: str) -> RunDir:
        """Take the next free ``STEM-N``, also when others do the same at the same moment."""
        while True:
            name = next_free(root, stem)
            try:
                return cls.create(root, name)
            except RunDirError:
                if next_free(root, stem) == name:  # the name is still free: it was not a race that we lost
                    raise

    @classmethod
    def open(cls, root: Path, name: str) -> RunDir:
        """Continue an existing run. Raises ``RunDirError`` if there is none, or if a process still runs it."""
        run = cls(root / name)
        if not run.config.is_file():
            raise RunDirError(f"--resume: there is no run {run.path}; start it without --resume")
        run._acquire()
        return run

    @property
    def name(self) -> str:
        """The run's name."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved settings, YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per learner step."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The result, JSON."""
        return self.path / "summary.json"

    @property
    def replay(self) -> Path:
        """The replay store."""
        return self.path / "replay"

    def place_replay(self, directory: str | None) -> Path:
        """Where the store's files lie: below ``directory`` if a new run asks for that, with ``replay`` leading there.

        ``RunDirError`` if another run has such a folder, or this one's is not on this machine.
        """
        if directory is not None and not self.replay.is_symlink() and not any(self.replay.iterdir()):
            target = Path(directory).expanduser().absolute() / self.name
            try:
                target.mkdir(parents=True)
            except OSError as error:
                raise RunDirError(
                    f"replay.directory={directory}: cannot make {target} for the store of this run: {error.strerror}; "
                    "remove what another run of that name left there, or choose another directory or name"
                ) from None
            self.replay.rmdir()
            self.replay.symlink_to(target)
        if not self.replay.exists():
            raise RunDirError(
                f"{self.replay} leads to {self.replay.readlink()}, which is not on this machine; resume on the one "
                "that has it, or bring the folder from there"
            )
        return self.replay.resolve()

    @property
    def checkpoints(self) -> Path:
        """The learner's checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """What engines, Ray and W&B have to say."""
        return self.path / "logs"

    @property
    def model(self) -> Path:
        """The trained model in Hugging Face format."""
        return self.path / "model"

    @property
    def status(self) -> Path:
        """What every component does: see `status.py`."""
        return self.path / "status.json"

    @property
    def control(self) -> Path:
        """Commands to the driver: see `mailbox.py`."""
        return self.path / "control"

    def runner(self) -> str | None:
        """The number of the process that runs this run now (its text, as the lock says it); None if nobody does."""
        try:
            lock = os.open(self.path / "lock", os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.read(lock, 32).decode(errors="replace").strip() or "?"
        finally:
            os.close(lock)
        return None

    def write_config(self, text: str) -> None:
        """Replace config.yaml as a whole."""
        write_atomic(self.config, text)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json as a whole."""
        write_atomic(self.summary, json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        """Let go of the lock; the folder stays."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _acquire(self) -> None:
        """Hold the lock; the kernel lets go of it when the process ends, however it ends."""
        lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(LOCK_PAUSE_S)
        else:
            holder = os.read(lock, 32).decode(errors="replace").strip()
            os.close(lock)
            raise RunDirError(f"{self.path} is being run by process {holder or '?'}; wait for it or stop it") from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        self._lock = lock
        # Whatever lies there was meant for a driver that is dead: only now can a command be meant for this one.
        for left in self.control.glob("*.json"):
            left.unlink(missing_ok=True)


def occupied(path: Path) -> RunDirError:
    """The error for a run name that is taken."""
    return RunDirError(
        f"name={path.name} is occupied: {path} exists; continue it with --resume, or choose another with name=…"
    )


def next_free(root: Path, stem: str) -> str:
    """The name after the highest existing ``STEM-N``: ``quickstart-3`` beside ``quickstart-1`` and ``quickstart-2``."""
    pattern = re.compile(re.escape(stem) + r"-(\d+)")
    names = [entry.name for entry in root.iterdir()] if root.is_dir() else []
    numbers = [int(match[1]) for match in map(pattern.fullmatch, names) if match]
    return f"{stem}-{max(numbers, default=0) + 1}"


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new content, never half of one, even after a power cut."""
    _replace(path, text, sync=os.fsync)


def write_whole(path: Path, text: str) -> None:
    """As ``write_atomic``, but without waiting for the disk: after a power cut the content may be lost."""
    _replace(path, text, sync=lambda descriptor: None)


def _replace(path: Path, text: str, *, sync: Callable[[int], None]) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            sync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
