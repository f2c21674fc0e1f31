"""Ray around the learner: one actor per rank, and the board. Nothing here but calls.

    driver ── start ──▶ LearnerActor × ranks ── train_step, publish, save, export ──▶ …
                             │ rank 0: ray.put(bucket) ──▶ references ──▶ driver ──▶ BoardActor ──▶ rollout workers

This module imports neither torch nor DeepSpeed: the driver, which only places the actors, need not load them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from learner.board import WeightBoard
from learner.config import LearnerConfig
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.logfile import redirect_output
from r2vpo.records import BatchSource, Buckets, BucketSpec, WeightManifest, WeightSender

if TYPE_CHECKING:
    from learner.trainer import LearnerTrainer


class StoreSender:
    """WeightSender that keeps every bucket in Ray's object store, where whoever comes may fetch it."""

    def open(self, *, rank: int, address: tuple[str, int]) -> None:
        """See ``WeightSender.open``: there is nobody to meet."""

    def put(self, payload: memoryview) -> ray.ObjectRef:
        """See ``WeightSender.put``."""
        return ray.put(np.frombuffer(payload, dtype=np.uint8))

    def send(self, buckets: Buckets, specs: Sequence[BucketSpec]) -> None:
        """See ``WeightSender.send``."""
        raise AssertionError("all buckets were kept")


class LearnerRank:
    """One rank of the learner group. The driver calls each method on all ranks, in the same order.

    `ping` answers beside a call that runs, and says what it is.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        config: LearnerConfig,
        algorithm: AlgorithmConfig,
        model_path: str,
        temperature: float,
        max_lag: int,
        max_replay_lag: int,
        exact_engine: bool,
        seed: int,
        canary_text: str = "",
        log_path: str | None = None,
    ) -> None:
        """See `learner.trainer.LearnerTrainer` for the settings; ``log_path`` takes what the process prints."""
        if log_path is not None:
            redirect_output(Path(log_path))
        self._rank, self._world_size, self._config, self._model_path = rank, world_size, config, model_path
        self._settings: dict[str, Any] = {
            "config": config,
            "algorithm": algorithm,
            "model_path": model_path,
            "temperature": temperature,
            "max_lag": max_lag,
            "max_replay_lag": max_replay_lag,
            "exact_engine": exact_engine,
            "seed": seed,
            "canary_text": canary_text,
        }
        self._built: LearnerTrainer | None = None
        self._sender: WeightSender = StoreSender()
        self._specs: tuple[BucketSpec, ...] = ()
        self._doing, self._since_s = "waiting to be started", time.time()

    def address(self) -> tuple[str, int]:
        """Address and a free port of this actor's machine, where the ranks can meet; ask rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, master_addr: str, master_port: int) -> dict[str, Any]:
        """Meet the other ranks and build the engine; returns once all are there.

        Returns ``num_parameters``, ``dtype``, ``start_s`` (seconds).
        """
        self._begin("loading the model")
        started = time.perf_counter()
        os.environ.setdefault("OMP_NUM_THREADS", str(self._config.omp_threads))
        import torch

        from learner.engine import ON_GPU, init_distributed
        from learner.trainer import LearnerTrainer

        if not ON_GPU:
            torch.set_num_threads(self._config.omp_threads)
        init_distributed(
            rank=self._rank,
            world_size=self._world_size,
            address=master_addr,
            port=master_port,
            timeout_s=self._config.step_timeout_s,
        )
        self._built = LearnerTrainer(**self._settings)
        self._done()
        engine = self._built.engine
        return {
            "num_parameters": engine.num_parameters,
            "dtype": engine.dtype,
            "start_s": time.perf_counter() - started,
        }

    def train_step(self, source: BatchSource) -> dict[str, float]:
        """One learner step; the metrics are the same on all ranks but for the times.

        They are those of `learner.trainer.LearnerTrainer.step`, and ``time/fetch_s``, the seconds until all groups of
        the batch were here.
        """
        self._begin("fetching a batch")
        started = time.perf_counter()
        batch = source.fetch()
        fetch_s = time.perf_counter() - started
        self._begin(f"learner step {batch.step}")
        metrics = self._trainer.step(batch)
        self._done()
        return {**metrics, "time/fetch_s": fetch_s}

    def open(self, sender: WeightSender) -> None:
        """Publish by another transport than the object store; all ranks, after ``start``."""
        self._begin("meeting the rollout workers")
        sender.open(rank=self._rank, address=self.address())
        self._sender = sender
        self._done()

    def publish(self) -> tuple[WeightManifest, list[ray.ObjectRef]] | None:
        """Encode the weights; rank 0 returns the manifest and one reference per bucket, or none: then ``send`` follows.

        The objects belong to this actor: they are gone when it dies.
        """
        self._begin(f"publishing version {self._trainer.version}")
        published = self._trainer.publish(self._sender.put)
        self._done()
        if published is None:
            return None
        manifest, references = published
        self._specs = manifest.buckets
        return manifest, [reference for reference in references if reference is not None]

    def send(self) -> None:
        """Hand over the version that was announced; returns once all workers have it."""
        self._begin(f"sending version {self._trainer.version}")
        self._sender.send(self._trainer.buckets(), self._specs)
        self._done()

    def save(self, directory: str) -> str:
        """Write a checkpoint of the current version below ``directory``; returns its path."""
        self._begin(f"writing the checkpoint of version {self._trainer.version}")
        path = self._trainer.save(Path(directory))
        self._done()
        return str(path)

    def load(self, path: str) -> int:
        """Restore a checkpoint before the first step; returns its version, the next learner step."""
        self._begin(f"loading {path}")
        self._trainer.load(Path(path))
        self._done()
        return self._trainer.version

    def export(self, directory: str) -> None:
        """Write the model in Hugging Face format to ``directory``, in place of a model that is already there."""
        self._begin(f"exporting the model to {directory}")
        self._trainer.export(Path(directory))
        self._done()

    @ray.method(concurrency_group="health")
    def ping(self) -> dict[str, Any]:
        """Rank, what it is doing, and since when (Unix time, seconds)."""
        return {"rank": self._rank, "doing": self._doing, "since_s": self._since_s}

    @property
    def _trainer(self) -> LearnerTrainer:
        assert self._built is not None, "start comes first"
        return self._built

    def _begin(self, doing: str) -> None:
        self._doing, self._since_s = doing, time.time()

    def _done(self) -> None:
        self._begin("waiting for the next call")


_OPTIONS: dict[str, Any] = {"max_restarts": 0, "concurrency_groups": {"health": 1}}
LearnerActor = ray.remote(**_OPTIONS)(LearnerRank)
"""`LearnerRank` as a Ray actor. Not restarted by Ray: a rank alone is of no use, the group starts together."""

BoardActor = ray.remote(num_cpus=0, max_restarts=0)(WeightBoard)
"""`learner.board.WeightBoard` as an asynchronous Ray actor; references inside lists are passed on, not resolved."""
