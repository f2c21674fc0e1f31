"""The Ray cluster of a job: start a private one or join one, and check that the actors will fit.

A private Ray listens on the loopback address only (see ``RayConfig.environment``) and ends with the job, whatever ends
that (see `reaper.py`). Its files lie in a folder of its own, since socket paths are short, and ``logs/ray`` in the
run's folder leads to its logs. The end of the job removes the folder; after a failure the logs take the link's place.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from r2vpo.job.component import ComponentLost
from r2vpo.job.config import NO_GPU_TO_BROADCAST, ConfigError, RunConfig
from r2vpo.job.ray_address import check_cluster
from r2vpo.job.reaper import descendants

MIB = 1 << 20
OBJECT_STORE_MB = 512
"""Object store (MiB) of a private Ray unless set: weights and batches of a model that a laptop can train."""
HOME_PREFIX = "r2vpo-ray-"
SESSION_LOGS = Path("session_latest", "logs")
"""Where Ray puts its logs below its folder."""
LEAVE_S = 15.0
"""Longest time that leaving Ray may take (seconds): as a rule it is one or two."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the job may use."""

    on_gpu: bool
    """Whether engines and learner run on GPUs."""
    home: Path | None
    """The folder for the files of a private Ray; it goes when the job ends."""
    time_shares: bool = False
    """Whether actors reserve no CPU: those of one machine share its cores, and more may always come."""

    def is_exact(self, config: RunConfig) -> bool:
        """Whether engine and learner both compute in float32, so that their log-probs differ by rounding only."""
        exact = ("float32",) if self.on_gpu else ("float32", "auto")
        return config.rollout.dtype in exact and config.learner.dtype in exact

    def options(
        self,
        num_cpus: float,
        num_gpus: float | None,
        *,
        gpus_each: int = 1,
        resources: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        """Ray resources of one actor; ``num_gpus=None`` is ``gpus_each`` where there are GPUs, else none."""
        gpus = (gpus_each if self.on_gpu else 0) if num_gpus is None else num_gpus
        cpus = 0 if self.time_shares else num_cpus
        return {"num_cpus": cpus, "num_gpus": gpus, "resources": dict(resources or {})}


def open_cluster(config: RunConfig, logs: Path) -> Cluster:
    """Start or join Ray. Raises ``ConfigError`` if the job's actors cannot be placed, naming need and supply;
    ``ComponentLost`` if a private Ray does not come up.

    ``close_cluster`` must follow, also after an error.
    """
    # An actor without GPUs keeps CUDA_VISIBLE_DEVICES as it finds it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    need_cpus = config.reserved_cpus
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "r2vpo"}
    if config.ray.address is not None:
        _join(config.ray.address, common)
        return _check_supply(config, need_cpus, None)
    home = make_home(logs)
    # CPUs of a private Ray are a book-keeping entry; Ray starts a process for each at once, so no more than are needed.
    cpus = config.ray.num_cpus or max(os.cpu_count() or 1, need_cpus)
    _start(
        home,
        num_cpus=int(cpus + 0.999),
        object_store_memory=(config.ray.object_store_mb or OBJECT_STORE_MB) * MIB,
        **common,
    )
    return _check_supply(config, need_cpus, home)


def _start(home: Path, **options: Any) -> None:
    try:
        ray.init(address="local", include_dashboard=False, _temp_dir=str(home), **options)
    except Exception as error:
        # What Ray says of processes that take longer than its 30 s has no type of its own.
        if type(error) is not Exception:
            raise
        _kill_below(lambda words: any(str(home) in word for word in words))
        raise ComponentLost(
            f"Ray does not start: {error} Is the machine overloaded? logs/ray in the run's folder may say more"
        ) from error


def _join(address: str, options: dict[str, Any]) -> None:
    check_cluster(address)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, AuthenticationError) as error:
        raise ConfigError(
            f"ray.address={address}: no Ray cluster answers there ({error}); check `ray status`, or set "
            "ray.address=null for a private one"
        ) from error


def close_cluster(logs: Path, *, keep_logs: bool) -> None:
    """Leave Ray, and end a private one; its own logs stay below ``logs`` if that is wanted."""
    with _raylet_ends_within(LEAVE_S):
        ray.shutdown()
    _remove_home(logs, keep_logs=keep_logs)


@contextmanager
def _raylet_ends_within(limit_s: float) -> Iterator[None]:
    """Who leaves Ray waits for its raylet, and one that was stopped never answers: a private one is killed then."""
    timer = threading.Timer(limit_s, _kill_below, (lambda words: Path(words[0]).name == "raylet",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _kill_below(is_meant: Callable[[list[str]], bool]) -> None:
    """SIGKILL to those of this process's descendants whose command line is meant."""
    for process in descendants(os.getpid()):
        with suppress(OSError):  # it has ended
            if is_meant(Path(f"/proc/{process}/cmdline").read_text(errors="replace").split("\0")):
                os.kill(process, signal.SIGKILL)


def make_home(logs: Path) -> Path:
    """A folder for the files of a private Ray, with ``logs/ray`` leading to its logs."""
    _remove_home(logs, keep_logs=False)  # of a process of this run that was killed
    link = logs / "ray"
    if link.is_dir():
        shutil.rmtree(link)
    home = Path(tempfile.mkdtemp(prefix=HOME_PREFIX))
    link.symlink_to(home / SESSION_LOGS)
    return home


def _remove_home(logs: Path, *, keep_logs: bool) -> None:
    """Remove the folder that ``logs/ray`` leads to, if it does."""
    link = logs / "ray"
    if not link.is_symlink():
        return
    target = Path(os.readlink(link))
    home = target.parents[1]
    link.unlink()
    if not home.name.startswith(HOME_PREFIX):
        return
    if keep_logs:
        with suppress(OSError):  # they may say more about a failure, but must not become another
            shutil.copytree(target, link)
    shutil.rmtree(home, ignore_errors=True)


def _check_supply(config: RunConfig, need_cpus: float, home: Path | None) -> Cluster:
    supply = ray.cluster_resources()
    time_shares = home is not None and config.ray.num_cpus is None
    cluster = Cluster(on_gpu=supply.get("GPU", 0) > 0, home=home, time_shares=time_shares)
    if config.fixed_fleet and not cluster.on_gpu:
        raise ConfigError(NO_GPU_TO_BROADCAST)
    rollout = sum(
        pool.workers * cluster.options(0, pool.num_gpus, gpus_each=pool.tensor_parallel_size)["num_gpus"]
        for pool in config.rollout.by_pool.values()
    )
    learner = cluster.options(0, config.learner.num_gpus)["num_gpus"]
    need_gpus = rollout + config.learner.ranks * learner
    for name, need, key in (("CPU", need_cpus, "num_cpus"), ("GPU", need_gpus, "num_gpus")):
        if need > supply.get(name, 0):
            raise ConfigError(
                f"the job needs {need:g} {name}s (rollout.workers={config.rollout.workers}, "
                f"learner.ranks={config.learner.ranks}) and the cluster has {supply.get(name, 0):g}; lower "
                f"rollout.workers or learner.ranks, or rollout.{key} and learner.{key}"
            )
    for name, need in custom_resources(config).items():
        if need > supply.get(name, 0):
            raise ConfigError(
                f"the job needs {need:g} of the Ray resource {name} (rollout.resources, learner.resources) and the "
                f"cluster has {supply.get(name, 0):g}; declare it on the nodes that are meant (ray start "
                f"--resources='{{\"{name}\": 8}}'), or correct the setting"
            )
    return cluster


def custom_resources(config: RunConfig) -> dict[str, float]:
    """What all workers and ranks together ask of Ray's custom resources."""
    need: dict[str, float] = {}
    pools = [(pool, pool.workers) for pool in config.rollout.by_pool.values()]
    for section, count in (*pools, (config.learner, config.learner.ranks)):
        for name, each in section.resources.items():
            need[name] = need.get(name, 0.0) + count * each
    return need
