"""A plan: what a run would need on given machines, before anything is judged."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace

from r2vpo.job import plan_batch
from r2vpo.job.config import RunConfig
from r2vpo.job.plan_batch import Batch, Growth, Lag
from r2vpo.job.plan_cluster import GIB, Shape
from r2vpo.job.plan_host import MIB, Host, host, object_store_bytes
from r2vpo.job.plan_memory import EngineMemory, LearnerMemory, engine_memory, learner_memory
from r2vpo.job.plan_model import ITEM_BYTES, ModelShape
from r2vpo.job.plan_place import Actors, actors, as_private, place
from r2vpo.job.plan_sync import Sync


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All numbers of a plan."""

    config: RunConfig
    shape: Shape
    """The machines as they are."""
    private: bool
    """Whether the run would start a Ray of its own, whose CPUs are book-keeping."""
    model: ModelShape
    actors: tuple[Actors, ...]
    placed: Sequence[dict[str, int]] | None
    """Actors on every machine; None if they do not fit."""
    batch: Batch
    lag: Lag
    growth: Growth
    learner_dtype: str
    flash: bool
    """Whether the learner's attention needs no mask."""
    learner: LearnerMemory
    engine_dtype: str
    engine: EngineMemory
    hosts: tuple[Host, ...]
    """Main memory of every machine; empty if the actors do not fit."""
    store_bytes: float
    """Ray's object store on the smallest machine."""
    bucket_bytes: float
    """Largest object that holds weights."""
    sync: Sync
    num_prompts: int | None = None
    """Of one epoch; None where the dataset was not read."""
    free_bytes: int | None = None
    """Disk where the run will write; None for machines that are not here."""
    notes: tuple[str, ...] = ()
    """What could not be looked at."""


def plan_facts(
    config: RunConfig,
    shape: Shape,
    model: ModelShape,
    *,
    bandwidth: float,
    measured: bool,
    step_s: float,
    num_prompts: int | None = None,
    free_bytes: int | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The numbers of ``config`` for ``model`` on ``shape``. ``bandwidth`` in bytes per second."""
    on_gpu = shape.on_gpu
    private = config.ray.address is None and len(shape.machines) == 1
    wanted = actors(config, on_gpu=on_gpu)
    placed = place(wanted, as_private(shape, config) if private else shape)
    batch = plan_batch.batch(config)
    dtype, flash = learner_dtype(config, on_gpu=on_gpu), uses_flash(config, on_gpu=on_gpu)
    learner = memory_of_learner(config, model, batch, on_gpu=on_gpu)
    published_bytes = ITEM_BYTES[dtype] * model.num_parameters
    bucket_bytes = min(published_bytes, config.learner.bucket_mb * MIB)
    engine = memory_of_engine(config, model, shape, bucket_bytes=bucket_bytes)
    hosts = [
        host(
            config,
            machine,
            there,
            first=number == 0,
            on_gpu=on_gpu,
            learner=learner,
            engine=engine,
            published_bytes=published_bytes,
        )
        for number, (machine, there) in enumerate(zip(shape.machines, placed or (), strict=False))
    ]
    return Plan(
        config=config,
        shape=shape,
        private=private,
        model=model,
        actors=wanted,
        placed=placed,
        batch=batch,
        lag=plan_batch.lag(config),
        growth=plan_batch.growth(config, step_s=step_s),
        learner_dtype=dtype,
        flash=flash,
        learner=learner,
        engine_dtype=engine_dtype(config, model, on_gpu=on_gpu),
        engine=engine,
        hosts=tuple(hosts),
        store_bytes=min(object_store_bytes(config, machine, private=private) for machine in shape.machines),
        bucket_bytes=bucket_bytes,
        sync=Sync(num_bytes=published_bytes, bandwidth=bandwidth, measured=measured),
        num_prompts=num_prompts,
        free_bytes=free_bytes,
        notes=tuple(notes),
    )


def learner_dtype(config: RunConfig, *, on_gpu: bool) -> str:
    """As `learner.engine` takes it."""
    return ("bfloat16" if on_gpu else "float32") if config.learner.dtype == "auto" else config.learner.dtype


def engine_dtype(config: RunConfig, model: ModelShape, *, on_gpu: bool) -> str:
    """As `rollout.engine` takes it; vLLM runs float32 models in bfloat16 where it may choose."""
    if config.rollout.dtype != "auto":
        return config.rollout.dtype
    if not on_gpu:
        return "float32"
    return model.dtype if model.dtype in ("bfloat16", "float16") else "bfloat16"


def uses_flash(config: RunConfig, *, on_gpu: bool) -> bool:
    """Whether flash attention is configured, or found by ``auto``: on GPUs, in bfloat16, where it is installed."""
    if config.learner.attention != "auto":
        return config.learner.attention == "flash_attention_2"
    installed = importlib.util.find_spec("flash_attn") is not None
    return on_gpu and installed and learner_dtype(config, on_gpu=on_gpu) == "bfloat16"


def memory_of_learner(config: RunConfig, model: ModelShape, batch: Batch, *, on_gpu: bool) -> LearnerMemory:
    """One rank."""
    return learner_memory(
        model,
        batch,
        dtype=learner_dtype(config, on_gpu=on_gpu),
        stage=config.learner.zero_stage,
        ranks=config.learner.ranks,
        checkpointing=config.learner.gradient_checkpointing,
        flash=uses_flash(config, on_gpu=on_gpu),
        on_gpu=on_gpu,
    )


def memory_of_engine(config: RunConfig, model: ModelShape, shape: Shape, *, bucket_bytes: float) -> EngineMemory:
    """One engine; with ``kv_cache_gb=null`` on a GPU the cache takes what the weights leave of its share, at most."""
    rollout, on_gpu = config.rollout, shape.on_gpu
    gpus = min(pool.tensor_parallel_size for pool in rollout.by_pool.values()) if on_gpu else 1
    kv_bytes = None if rollout.kv_cache_gb is None else rollout.kv_cache_gb * GIB
    dtype = engine_dtype(config, model, on_gpu=on_gpu)
    engine = engine_memory(model, dtype=dtype, kv_cache_bytes=kv_bytes, bucket_bytes=bucket_bytes, gpus=gpus)
    if kv_bytes is None and on_gpu and shape.gpu_memory_bytes is not None:
        engine = replace(engine, kv_cache=rollout.gpu_memory_utilization * shape.gpu_memory_bytes - engine.weights)
    return engine
