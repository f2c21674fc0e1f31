"""A head node of its own: Ray with a job server on the loopback address, in a folder that goes away with it.

Its home is that folder too, it asks for a token that was made for it, and its Python has everything that is installed
here but r2vpo.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.table import REPOSITORY

START_S = 120.0
"""Longest wait for the job server (seconds)."""
END_S = 60.0
"""Longest wait for all of Ray to end (seconds)."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A head node that is up, and a user's machine beside it."""

    address: str
    """Of the job server."""
    home: Path
    """Home folder of the head node."""
    user: dict[str, str]
    """Environment of the user's commands, with the cluster's token."""

    def r2vpo(self, *argv: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Run ``r2vpo ARGV --address …`` as the user."""
        return subprocess.run(
            [sys.executable, "-m", "r2vpo", *argv, "--address", self.address],
            cwd=REPOSITORY,
            env=self.user,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


@contextmanager
def head_node(num_cpus: int = 4) -> Iterator[Head]:
    """Start Ray, and end it with all that it started."""
    # Sockets lie below this folder, and their paths must be short.
    home = Path(tempfile.mkdtemp(prefix="r2vpo-head-", dir="/tmp"))
    port, dashboard = _free_ports(2)
    python = python_without_r2vpo(home / "venv")
    environment = _environment(home, python)
    command = [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += ["--disable-usage-stats"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--temp-dir={home / 'ray'}", f"--num-cpus={num_cpus}", "--object-store-memory=268435456"]
    with (home / "head.log").open("w") as log:
        ray = subprocess.Popen(
            [*map(str, command)], cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _await_job_server(f"http://127.0.0.1:{dashboard}", ray, home / "head.log")
        # The user's Ray is not told that there is a token to be sent: r2vpo finds out.
        user = {key: value for key, value in environment.items() if key not in ("RAY_AUTH_MODE", "PYTHONPATH")}
        user["PYTHONPATH"] = str(REPOSITORY)
        yield Head(address=f"http://127.0.0.1:{dashboard}", home=home, user=user)
    finally:
        ray.terminate()  # in --block mode, Ray ends its own processes then
        try:
            ray.wait(END_S)
        finally:
            _kill_group(ray.pid)
            shutil.rmtree(home, ignore_errors=True)


def python_without_r2vpo(folder: Path) -> Path:
    """A virtual environment with the packages that are installed here, by links, except r2vpo."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "r2vpo" not in entry.name and entry.name != "__pycache__":
            (packages / entry.name).symlink_to(entry)
    python = folder / "bin" / "python"
    asked = subprocess.run([python, "-c", "import r2vpo"], capture_output=True, text=True, cwd=folder, env={})
    assert "No module named 'r2vpo'" in asked.stderr, asked.stderr
    return python


def _environment(home: Path, python: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    return kept | {
        "HOME": str(home),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # every server listens on 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
        "no_proxy": "127.0.0.1,localhost",
    }


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _await_job_server(address: str, ray: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and ray.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=1)
        except urllib.error.HTTPError:
            return  # it asks for the token
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"no job server at {address}: {log.read_text()}")


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
