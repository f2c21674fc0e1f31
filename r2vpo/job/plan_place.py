"""Which actors a run has, what each asks of Ray, and whether the machines have room for all of them at once.

Ray places actors one by one and never moves them, so a plan packs the largest first, tightly: where even that
fails, Ray has no chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from r2vpo.job.config import RunConfig
from r2vpo.job.plan_cluster import Shape
from rollout.config import RolloutConfig

WORKER = "rollout worker"


@dataclass(frozen=True, kw_only=True)
class Actors:
    """Alike actors."""

    name: str
    count: int
    cpus: float
    """CPUs that each reserves."""
    gpus: float
    """GPUs that each reserves."""

    @property
    def all_cpus(self) -> float:
        """CPUs of all of them."""
        return self.count * self.cpus

    @property
    def all_gpus(self) -> float:
        """GPUs of all of them."""
        return self.count * self.gpus


def actors(config: RunConfig, *, on_gpu: bool) -> tuple[Actors, ...]:
    """Every actor of a run; workers and ranks take GPUs where there are any, as in `Cluster.options`."""
    learner = config.learner
    rank_gpus = (1 if on_gpu else 0) if learner.num_gpus is None else learner.num_gpus
    return (
        *(_workers(name, pool, on_gpu=on_gpu) for name, pool in config.rollout.by_pool.items()),
        Actors(name="learner rank", count=learner.ranks, cpus=learner.num_cpus, gpus=rank_gpus),
        Actors(name="replay shard", count=config.replay.shards, cpus=0, gpus=0),
        Actors(name="replay actor", count=1, cpus=0, gpus=0),
        Actors(name="weight board", count=1, cpus=0, gpus=0),
    )


def _workers(pool: str, rollout: RolloutConfig, *, on_gpu: bool) -> Actors:
    gpus = (rollout.tensor_parallel_size if on_gpu else 0) if rollout.num_gpus is None else rollout.num_gpus
    return Actors(name=f"{WORKER} {pool}".rstrip(), count=rollout.workers, cpus=rollout.num_cpus, gpus=gpus)


def place(wanted: Sequence[Actors], shape: Shape) -> list[dict[str, int]] | None:
    """How many of each kind every machine takes; None if one actor finds no machine with room.

    The largest first, each on the fullest machine that has room; actors that reserve nothing go round robin.
    """
    free = [(machine.gpus, machine.cpus) for machine in shape.machines]
    placed: list[dict[str, int]] = [{} for _ in shape.machines]
    for kind in sorted(wanted, key=lambda kind: (-kind.gpus, -kind.cpus)):
        for number in range(kind.count):
            if kind.gpus or kind.cpus:
                fitting = [i for i in range(len(free)) if free[i][0] >= kind.gpus and free[i][1] >= kind.cpus]
                if not fitting:
                    return None
                at = min(fitting, key=lambda i: free[i])
                free[at] = (free[at][0] - kind.gpus, free[at][1] - kind.cpus)
            else:
                at = number % len(free)
            placed[at][kind.name] = placed[at].get(kind.name, 0) + 1
    return placed


def as_private(shape: Shape, config: RunConfig) -> Shape:
    """What a private Ray offers on the first machine: its CPUs are book-keeping (see `cluster.open_cluster`)."""
    machine = shape.machines[0]
    cpus = config.ray.num_cpus or max(machine.cpus, config.reserved_cpus)
    return replace(shape, machines=(replace(machine, cpus=cpus),))
