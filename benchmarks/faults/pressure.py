"""Not a process but what it lives on: a disk that is full for a while, and a small object store.

The disk holds the whole folder of the run: store, checkpoints, metrics, logs. It is a file system of its own that only
the case's process may see (``unshare``). A run may end by it if ``--resume`` goes on.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.faults.watch import await_more_steps, await_that
from benchmarks.table import QUICK, REPOSITORY, Row, at_least, at_most, emit, reported
from tests.faults.victims import Run

STEPS = 15 if QUICK else 30
SETTINGS = (f"learner.steps={STEPS}", "learner.checkpoint_every=5", "task.eval_prompts=32")
DISK_MB = 1280
"""A run asks for 1 GiB before it starts (MiB)."""
FULL_S = 8.0 if QUICK else 20.0
"""How long the disk stays full (seconds)."""
CHUNK = b"\0" * 2**16


def measure() -> Iterator[Row]:
    for name, case, prefix in (
        ("disk full for a while", "full_disk", ["unshare", "-rm"]),
        ("object store of 80 MB", "small_object_store", []),
    ):
        with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
            command = [*prefix, sys.executable, "-m", __spec__.name, case, folder]
            done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:  # what it said stands on standard error
            yield Row(f"pressure: {name}: steps", float("nan"), "", f">= {STEPS}", False)
            continue
        steps, violations, resumes = json.loads(done.stdout.splitlines()[-1])
        yield at_least(f"pressure: {name}: steps", steps, "", STEPS)
        yield at_most(f"pressure: {name}: violations that verify --deep finds", violations, "", 0)
        yield reported(f"pressure: {name}: times that it had to be resumed", resumes, "")


def full_disk(folder: Path) -> tuple[int, int, int]:
    """Somebody else fills the disk in the middle of a run, and leaves."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", disk], check=True)
    run = Run(disk, *SETTINGS)
    await_that(run, "steps", lambda: len(run.steps()) >= 5)
    fill(disk / "ballast")
    until_s = time.monotonic() + FULL_S
    while time.monotonic() < until_s and run.exit_code is None:
        fill(disk / "ballast")  # also what is freed meanwhile
        time.sleep(0.2)
    (disk / "ballast").unlink()
    return _seen_to_its_end(run, disk)


def small_object_store(folder: Path) -> tuple[int, int, int]:
    """The smallest that Ray takes: weights and batches come and go in it."""
    run = Run(folder, *SETTINGS, "ray.object_store_mb=80", "rollout.workers=2")
    await_more_steps(run, 1)
    return _seen_to_its_end(run, folder)


def fill(ballast: Path) -> None:
    """Take all that the disk has left."""
    with suppress(OSError), ballast.open("ab", buffering=0) as file:  # ENOSPC is what it works towards
        while True:
            file.write(CHUNK)


def _seen_to_its_end(run: Run, folder: Path) -> tuple[int, int, int]:
    """Steps, violations, and how often it had to be resumed."""
    resumes = 0
    code, output = run.end()
    while code != 0 and resumes < 2:
        print(f"pressure: exit code {code}: {output[-1500:]}", file=sys.stderr)
        run, resumes = Run(folder, *SETTINGS, "--resume"), resumes + 1
        code, output = run.end()
    for line in output.splitlines():
        if "note:" in line:
            print(f"pressure: {line}", file=sys.stderr)
    audit = run.audit()
    for violation in audit.violations:
        print(f"pressure: {violation.rule}: {violation.sentence}", file=sys.stderr)
    return (audit.version if code == 0 else -1), len(audit.violations), resumes


if __name__ == "__main__":
    if sys.argv[1:]:
        case = {"full_disk": full_disk, "small_object_store": small_object_store}[sys.argv[1]]
        print(json.dumps(case(Path(sys.argv[2]))))
    else:
        emit(measure())
