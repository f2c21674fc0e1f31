"""Ray nodes of one machine: some in its own network, and one in a network of its own that can be cut off."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

WAIT_S = 240.0
"""Longest wait for anything (seconds)."""
OBJECT_STORE = 150 << 20
"""Of every node (bytes)."""
HEALTH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""Ray gives a silent node up after about ten seconds."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}


def until(holds: Callable[[], object], what: str) -> None:
    """Return once ``holds``."""
    until_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < until_s, f"no {what} within {WAIT_S:g} s"
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class RayNode:
    """One raylet with what it started, and on a head the GCS; ended as a whole, as a machine is."""

    def __init__(self, folder: Path, *argv: str, inside: tuple[str, ...] = ()) -> None:
        """``inside``: the command that runs others in another network."""
        self.log = folder / f"node-{time.time_ns()}.log"
        command = [*inside, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += [f"--object-store-memory={OBJECT_STORE}", *argv]
        self.process = subprocess.Popen(
            command,
            env=dict(os.environ) | HEALTH | QUIET,
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def await_start(self) -> None:
        """Return once it has joined."""

        def has_started() -> bool:
            assert not self.has_ended, self.log.read_text()
            return "Ray runtime started" in self.log.read_text()

        until(has_started, "Ray node")

    def kill(self) -> None:
        """SIGKILL to every process of it at once: the machine is gone."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)

    def runs(self, title: str) -> bool:
        """Whether one of its processes has this title."""
        for process in self._family():
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if title in " ".join(process.cmdline()):
                    return True
        return False

    def _family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            return [first, *first.children(recursive=True)]
        return []


class Island:
    """A network namespace, joined to this machine's network by one cable that can be pulled. Needs root."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self._name, self._here, self._there = f"r2vpo-{tag}", f"r2h{tag}", f"r2i{tag}"
        subnet = f"10.{os.getpid() % 200 + 20}.{secrets.randbelow(250)}"
        self.shore, self.address = f"{subnet}.1", f"{subnet}.2"
        self.inside = ("ip", "netns", "exec", self._name)
        _ip("netns", "add", self._name)
        _ip("link", "add", self._here, "type", "veth", "peer", "name", self._there)
        _ip("link", "set", self._there, "netns", self._name)
        _ip("addr", "add", f"{self.shore}/24", "dev", self._here)
        _ip("-n", self._name, "addr", "add", f"{self.address}/24", "dev", self._there)
        _ip("-n", self._name, "link", "set", "lo", "up")
        _ip("-n", self._name, "link", "set", self._there, "up")
        self.heal()

    def cut(self) -> None:
        """Pull the cable. Nobody is told: packets are lost."""
        _ip("-n", self._name, "link", "set", self._there, "down")

    def heal(self) -> None:
        """Plug it in again."""
        _ip("link", "set", self._here, "up")
        _ip("-n", self._name, "link", "set", self._there, "up")

    def close(self) -> None:
        _ip("link", "del", self._here)
        _ip("netns", "del", self._name)


def _ip(*argv: str) -> None:
    subprocess.run(["ip", *argv], check=True, capture_output=True)


class Nodes:
    """A head and nodes that join it."""

    def __init__(self, folder: Path, address: str) -> None:
        self._folder, self._host, self._port = folder, address, free_port()
        self.address = f"{address}:{self._port}"
        self.nodes: list[RayNode] = []

    def head(self, **resources: float) -> RayNode:
        home = self._folder / "ray"
        options = (f"--port={self._port}", f"--temp-dir={home}", "--include-dashboard=false")
        return self._start("--head", *options, **resources)

    def join(self, *labels: str, island: Island | None = None, **resources: float) -> RayNode:
        """A node with ``labels`` such as ``market=spot``; ``cpus`` and any others are its resources."""
        said = [f"--labels={','.join(labels)}"] if labels else []
        return self._start(f"--address={self.address}", *said, island=island, **resources)

    def _start(self, *argv: str, island: Island | None = None, **resources: float) -> RayNode:
        address = island.address if island else self._host
        given = {name: amount for name, amount in resources.items() if name != "cpus"}
        node = RayNode(
            self._folder,
            *argv,
            f"--node-ip-address={address}",
            f"--num-cpus={resources.get('cpus', 2):g}",
            f"--resources={json.dumps(given)}",
            inside=island.inside if island else (),
        )
        self.nodes.append(node)
        node.await_start()  # nodes of one machine that start at once take each other's ports
        return node


@contextmanager
def ray_nodes(address: str = "127.0.0.1") -> Iterator[Nodes]:
    """Nodes that end with the block, in a folder that goes with them: Ray's sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="r2vpo-nodes-", dir="/tmp"))
    nodes = Nodes(folder, address)
    try:
        yield nodes
    finally:
        for node in reversed(nodes.nodes):
            node.kill()
        shutil.rmtree(folder, ignore_errors=True)
