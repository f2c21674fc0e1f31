"""A private Ray is for its job alone: nobody else on the machine or the network can give it work."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from r2vpo.job import ray_address
from r2vpo.job.reaper import descendants
from tests.bad_input.test_secrets import PLANTED, files_with
from tests.e2e.runs import CONFIG, REPOSITORY

pytestmark = pytest.mark.engine

LISTENING = "0A"
LOOPBACK = ("127.", "::1", "::ffff:127.")


class PrivateRay(NamedTuple):
    process: subprocess.Popen[str]
    folder: Path
    """The home directory of whoever runs it, with the folder `logs` of the run."""
    address: tuple[str, int]
    token: str


@pytest.fixture(scope="module")
def private_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateRay]:
    folder = tmp_path_factory.mktemp("home")
    (folder / "logs").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | PLANTED
    del environment["RAY_AUTH_TOKEN"]  # it makes one of its own
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.e2e.private_ray", str(CONFIG), str(folder / "logs")],
        cwd=REPOSITORY,
        env=environment | {"HOME": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    address, token = process.stdout.readline().split()
    host, _, port = address.rpartition(":")
    yield PrivateRay(process, folder, (host, int(port)), token)
    process.stdin.close()
    process.wait(60)


def listening(processes: set[int]) -> list[str]:
    """Addresses on which the processes wait for connections, from /proc."""
    inodes = {os.readlink(fd) for pid in processes for fd in open_files(pid) if fd.is_symlink()}
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == LISTENING and f"socket:[{words[9]}]" in inodes:
                digits = words[1].partition(":")[0]
                # Words of four bytes, each as this machine has them in memory.
                words_of_4 = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
                found.append(socket.inet_ntop(family, b"".join(words_of_4)))
    return found


def open_files(pid: int) -> list[Path]:
    try:
        return list(Path("/proc", str(pid), "fd").iterdir())
    except OSError:  # it has ended
        return []


def test_every_server_of_it_listens_on_the_loopback_address(private_ray):
    addresses = listening({private_ray.process.pid, *descendants(private_ray.process.pid)})
    assert len(addresses) >= 3, "GCS, raylet and the driver's own server"
    assert [address for address in addresses if not address.startswith(LOOPBACK)] == []


def test_a_server_that_listens_everywhere_would_be_seen():
    with socket.create_server(("", 0)):
        assert "0.0.0.0" in listening({os.getpid()})


def test_it_answers_only_to_its_token(private_ray):
    assert not ray_address._lets_in(private_ray.address, None)
    assert not ray_address._lets_in(private_ray.address, "f" * 64)
    assert ray_address._lets_in(private_ray.address, private_ray.token)


def test_it_ends_although_its_raylet_hangs_and_leaves_the_token_and_secrets_of_the_environment_in_no_file(private_ray):
    below = [psutil.Process(process) for process in descendants(private_ray.process.pid)]
    [raylet] = [process for process in below if process.name() == "raylet"]
    raylet.suspend()
    private_ray.process.stdin.close()
    assert private_ray.process.wait(60) == 0
    assert (private_ray.folder / "logs" / "ray" / "raylet.out").is_file()
    for name, secret in {**PLANTED, "RAY_AUTH_TOKEN": private_ray.token}.items():
        assert files_with(secret, private_ray.folder) == [], name
