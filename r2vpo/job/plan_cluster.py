"""The machines that a plan is made for: told by the user, those of a Ray cluster, or this machine."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from r2vpo.job.config import ConfigError, RayConfig
from r2vpo.job.ray_address import check_cluster

GIB = 1 << 30
NVIDIA_TIMEOUT_S = 5.0
KEYS = {"nodes": "1", "cpus": None, "gpus": "0", "memory_gb": None, "gpu_memory_gb": None}
"""What ``--cluster`` takes, with the defaults of what may be left out; ``gpu_memory_gb`` is needed only with GPUs."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One machine of a cluster."""

    cpus: float
    """CPUs that it offers to Ray."""
    gpus: float = 0
    """GPUs that it offers to Ray."""
    memory_bytes: float
    """Main memory."""
    gpu_memory_bytes: float | None = None
    """Memory of each of its GPUs; None where that is not known."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The machines of a cluster, and how they are known."""

    origin: str
    """``this machine``, ``simulated`` or ``Ray at ADDRESS``."""
    machines: tuple[Machine, ...]

    @property
    def on_gpu(self) -> bool:
        """Whether engines and learner would run on GPUs, as `Cluster.on_gpu` says once Ray is up."""
        return self.gpus > 0

    @property
    def cpus(self) -> float:
        """CPUs of all machines."""
        return sum(machine.cpus for machine in self.machines)

    @property
    def gpus(self) -> float:
        """GPUs of all machines."""
        return sum(machine.gpus for machine in self.machines)

    @property
    def gpu_memory_bytes(self) -> float | None:
        """Memory of the smallest GPU: where an actor lands is Ray's choice."""
        return min((m.gpu_memory_bytes for m in self.machines if m.gpus and m.gpu_memory_bytes), default=None)


def simulated(text: str) -> Shape:
    """``nodes=2,gpus=8,cpus=96,memory_gb=1000,gpu_memory_gb=80``: alike machines; all but ``nodes`` is per machine.

    Sizes are GiB. ``ValueError`` naming what is wrong.
    """
    given = dict(KEYS)
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        if not equals or key not in KEYS:
            raise ValueError(f"--cluster: {part.strip() or 'nothing'} is none of {', '.join(f'{k}=…' for k in KEYS)}")
        given[key] = value
    numbers = {key: _number(key, value) for key, value in given.items() if value is not None}
    for key in ("cpus", "memory_gb", *(("gpu_memory_gb",) if numbers["gpus"] else ())):
        if key not in numbers:
            raise ValueError(f"--cluster={text} does not say {key} (of each node)")
    if numbers["nodes"] < 1 or numbers["nodes"] % 1:
        raise ValueError(f"--cluster: nodes={given['nodes']} must be a whole number, 1 or more")
    gpu_memory = numbers.get("gpu_memory_gb")
    machine = Machine(
        cpus=numbers["cpus"],
        gpus=numbers["gpus"],
        memory_bytes=numbers["memory_gb"] * GIB,
        gpu_memory_bytes=None if gpu_memory is None else gpu_memory * GIB,
    )
    return Shape(origin="simulated", machines=(machine,) * int(numbers["nodes"]))


def local() -> Shape:
    """This machine, within the limits of its container."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    gpus_bytes = _gpus()
    machine = Machine(
        cpus=os.cpu_count() or 1,
        gpus=len(gpus_bytes),
        memory_bytes=memory,
        gpu_memory_bytes=min(gpus_bytes, default=None),
    )
    return Shape(origin="this machine", machines=(machine,))


def joined(config: RayConfig) -> Shape:
    """The Ray cluster at ``config.address``. ``ConfigError`` if none answers there."""
    try:
        check_cluster(config.address or "auto")
        os.environ.update(config.environment())
        import ray  # only here: a plan for other machines needs none

        ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"ray.address={config.address}: no Ray cluster answers there ({error}); check `ray status`, or give "
            "--cluster to plan for machines that are not there"
        ) from error
    try:
        supplies = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()
    machines = tuple(
        Machine(cpus=s.get("CPU", 0), gpus=s.get("GPU", 0), memory_bytes=s.get("memory", 0) + _store(s))
        for s in supplies
    )
    return Shape(origin=f"Ray at {config.address}", machines=machines)


def _store(supply: dict[str, float]) -> float:
    """Ray counts its object store apart from the memory that it offers."""
    return supply.get("object_store_memory", 0)


def _gpus() -> list[int]:
    """Memory (bytes) of every GPU of this machine, as the driver's own tool says; none where it is not installed."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=NVIDIA_TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return []
    return [int(line) << 20 for line in ended.stdout.split("\n") if line.strip().isdigit()]


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"--cluster: {key}={text} must be a number") from None
    if not 0 <= value < 1e9:
        raise ValueError(f"--cluster: {key}={text} must be 0 or more")
    return value
