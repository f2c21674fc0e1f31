"""The Ray cluster of a job: start a private one or join one, and check that the actors will fit.

A private Ray listens on the loopback address only (see ``RayConfig.environment``) and ends with the job.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import ray

from r2vpo.job.config import ConfigError, RunConfig

MIB = 1 << 20
OBJECT_STORE_MB = 512
"""Object store (MiB) of a private Ray unless set: weights and batches of a model that a laptop can train."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the job may use."""

    on_gpu: bool
    """Whether engines and learner run on GPUs."""

    def options(self, num_cpus: float, num_gpus: float | None, *, gpus_each: int = 1) -> dict[str, Any]:
        """Ray resources of one actor; ``num_gpus=None`` is ``gpus_each`` where there are GPUs, else none."""
        gpus = (gpus_each if self.on_gpu else 0) if num_gpus is None else num_gpus
        return {"num_cpus": num_cpus, "num_gpus": gpus}


def open_cluster(config: RunConfig) -> Cluster:
    """Start or join Ray. Raises ``ConfigError`` if the job's actors cannot be placed, naming need and supply."""
    # An actor without GPUs keeps CUDA_VISIBLE_DEVICES as it finds it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    need_cpus = config.rollout.workers * config.rollout.num_cpus + config.learner.ranks * config.learner.num_cpus
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "r2vpo"}
    if config.ray.address is None:
        # CPUs of a private Ray are a book-keeping entry: a small machine time-shares its cores among the actors.
        cpus = config.ray.num_cpus or max(os.cpu_count() or 1, need_cpus)
        ray.init(
            address="local",
            num_cpus=int(cpus + 0.999),
            object_store_memory=(config.ray.object_store_mb or OBJECT_STORE_MB) * MIB,
            include_dashboard=False,
            **common,
        )
    else:
        try:
            ray.init(address=config.ray.address, **common)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(
                f"ray.address={config.ray.address}: no Ray cluster answers there ({error}); check `ray status`, or set "
                "ray.address=null for a private one"
            ) from error
    return _check_supply(config, need_cpus)


def _check_supply(config: RunConfig, need_cpus: float) -> Cluster:
    supply = ray.cluster_resources()
    cluster = Cluster(on_gpu=supply.get("GPU", 0) > 0)
    rollout = cluster.options(0, config.rollout.num_gpus, gpus_each=config.rollout.tensor_parallel_size)["num_gpus"]
    learner = cluster.options(0, config.learner.num_gpus)["num_gpus"]
    need_gpus = config.rollout.workers * rollout + config.learner.ranks * learner
    for name, need, key in (("CPU", need_cpus, "num_cpus"), ("GPU", need_gpus, "num_gpus")):
        if need > supply.get(name, 0):
            raise ConfigError(
                f"the job needs {need:g} {name}s (rollout.workers={config.rollout.workers}, "
                f"learner.ranks={config.learner.ranks}) and the cluster has {supply.get(name, 0):g}; lower "
                f"rollout.workers or learner.ranks, or rollout.{key} and learner.{key}"
            )
    return cluster
