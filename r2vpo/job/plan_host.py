"""Main memory of every machine: what each process takes before it does anything, and what the run adds.

The sizes of processes were measured once: PSS (/proc/PID/smaps_rollup), largest of a run of the quickstart on two
x86-64 cores without a GPU, with the versions in requirements/cpu.txt, weights and KV cache taken off. With CUDA builds
and drivers they are larger; that has not been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from r2vpo.job.config import RunConfig
from r2vpo.job.plan_cluster import GIB, Machine
from r2vpo.job.plan_memory import EngineMemory, LearnerMemory
from r2vpo.job.plan_place import WORKER

MIB = 1 << 20
DRIVER_BYTES = 110 * MIB
RAY_BYTES = 400 * MIB
"""Ray's own seven processes on a machine."""
STORE_BYTES = {"replay shard": 78 * MIB, "replay actor": 76 * MIB, "weight board": 70 * MIB}
"""Each actor of the roof and of replay."""
WORKER_BYTES = (460 + 700) * MIB
"""A rollout worker's process, and that of its engine."""
RANK_BYTES = 345 * MIB
REWARD_BYTES = 8 * MIB
"""One reward process with the standard library; math-verify takes some 60 MiB more."""
VERSIONS_KEPT = 3
"""Versions of the weights in the object store: two on the board (`learner.board`), and the one being put."""
SPILL_SHARE = 0.8
"""Share of the object store above which Ray begins to write objects to disk (`object_spilling_threshold`)."""
RAY_STORE_SHARE, RAY_STORE_MOST = 0.3, 200e9
"""Share of a machine's memory that a Ray cluster gives its object store, and the most, unless told otherwise."""
PRIVATE_STORE_MB = 512
"""Object store of a private Ray unless set; `cluster.OBJECT_STORE_MB`, which is not imported as it brings Ray."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """Main memory (bytes) of one machine, and the most that the run takes of it."""

    actors: Mapping[str, int]
    """How many of each kind run there."""
    processes: float
    engines: float
    """Weights and KV cache of engines on the CPU; 0 where they are on GPUs."""
    learners: float
    """What ranks on the CPU train with; on GPUs, the weights that every rank reads before it hands them over."""
    shared: float
    """Versions of the weights in the object store, and in the files from which workers load."""
    available: float

    @property
    def total(self) -> float:
        """All of it at once."""
        return self.processes + self.engines + self.learners + self.shared


def host(
    config: RunConfig,
    machine: Machine,
    placed: Mapping[str, int],
    *,
    first: bool,
    on_gpu: bool,
    learner: LearnerMemory,
    engine: EngineMemory,
    published_bytes: float,
) -> Host:
    """The machine with the actors ``placed`` on it; the driver runs on the ``first``."""
    workers = sum(count for name, count in placed.items() if name.startswith(WORKER))
    ranks = placed.get("learner rank", 0)
    own = sum(STORE_BYTES[kind] * placed.get(kind, 0) for kind in STORE_BYTES)
    rewards = workers * config.task.reward_processes * REWARD_BYTES
    processes = RAY_BYTES + first * DRIVER_BYTES + own + workers * WORKER_BYTES + ranks * RANK_BYTES + rewards
    versions = (VERSIONS_KEPT + workers) if workers or ranks else 0
    return Host(
        actors=dict(placed),
        processes=processes,
        engines=0.0 if on_gpu else workers * (engine.total or engine.weights + engine.reload),
        learners=ranks * (published_bytes if on_gpu else learner.total),
        shared=versions * published_bytes,
        available=machine.memory_bytes,
    )


def object_store_bytes(config: RunConfig, machine: Machine, *, private: bool) -> float:
    """Size of Ray's object store on a machine."""
    if private:
        return (config.ray.object_store_mb or PRIVATE_STORE_MB) * MIB
    return min(RAY_STORE_SHARE * machine.memory_bytes, RAY_STORE_MOST)


def gib(num_bytes: float) -> str:
    """``1.3 GiB``, ``310 GiB``; below one, MiB rounded up: ``20 MiB``."""
    value = num_bytes / GIB
    if value < 0.9995:
        return f"{ceil(num_bytes / MIB)} MiB"
    return f"{value:,.0f} GiB" if value >= 99.95 else f"{value:.1f} GiB"
