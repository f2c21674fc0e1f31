"""What a plan cannot do, and what it does wastefully: sentences with both numbers and the setting to change."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from r2vpo.job import plan_batch
from r2vpo.job.config import NO_GPU_TO_BROADCAST, RunConfig
from r2vpo.job.plan_cluster import GIB
from r2vpo.job.plan_facts import Plan, memory_of_learner
from r2vpo.job.plan_host import SPILL_SHARE, VERSIONS_KEPT, gib
from r2vpo.job.plan_place import WORKER

GPU_SHARE = 0.95
"""Share of a GPU's memory that a learner rank may plan with: CUDA itself and fragments take the rest."""
TIGHT = 0.85
"""Share of main memory above which a run that fits is still warned about."""
MASK_BYTES = GIB
"""Of masks, above which flash attention is worth a sentence."""


def problems(plan: Plan) -> list[str]:
    """What cannot work."""
    checks = (_supply, _transport, _learner_gpu, _engine_gpu, _shared_gpu, _kv_cache, _main_memory, _bucket)
    return [sentence for find in checks for sentence in find(plan)]


def warnings(plan: Plan) -> list[str]:
    """What works, but not as one would wish; then what could not be looked at."""
    checks = (_idle, _book_keeping, _threads, _kv_queue, _passes, _sharding, _mask, _tight, _spilling, _disk)
    return [*plan.config.notes, *(sentence for find in checks for sentence in find(plan)), *plan.notes]


def _supply(plan: Plan) -> Iterator[str]:
    """Every actor finds a machine with room."""
    if plan.placed is not None:
        return
    config, shape = plan.config, plan.shape
    each = "; ".join(
        f"{kind.name}: {kind.count} × ({kind.gpus:g} GPUs, {kind.cpus:g} CPUs)" for kind in plan.actors if kind.cpus
    )
    short = False
    for name, need, supply in (
        ("GPUs", sum(kind.all_gpus for kind in plan.actors), shape.gpus),
        ("CPUs", sum(kind.all_cpus for kind in plan.actors), shape.cpus),
    ):
        if need > supply and not (plan.private and name == "CPUs"):
            short = True
            key = f"num_{name.lower()}"
            yield (
                f"the actors ask for {need:g} {name} and the cluster has {supply:g} ({each}): lower rollout.workers="
                f"{config.rollout.workers} or learner.ranks={config.learner.ranks}, or rollout.{key} and learner.{key}"
            )
    if not short:
        largest = max(plan.actors, key=lambda kind: (kind.gpus, kind.cpus))
        machine = max(shape.machines, key=lambda m: (m.gpus, m.cpus))
        yield (
            f"the cluster has enough in all, but not together where an actor needs it: a {largest.name} asks for "
            f"{largest.gpus:g} GPUs and {largest.cpus:g} CPUs on one machine, and the largest has {machine.gpus:g} and "
            f"{machine.cpus:g} ({each}); lower rollout.tensor_parallel_size or num_cpus, or take fewer actors"
        )


def _transport(plan: Plan) -> Iterator[str]:
    """A broadcast finds the GPUs that it goes from and to."""
    if plan.config.fixed_fleet and not plan.shape.on_gpu:
        yield NO_GPU_TO_BROADCAST


def _learner_gpu(plan: Plan) -> Iterator[str]:
    """A learner rank fits into its GPU."""
    limit = plan.shape.gpu_memory_bytes
    if limit is None or plan.learner.total <= GPU_SHARE * limit:
        return
    yield (
        f"a learner rank needs {gib(plan.learner.total)} and its GPU has {gib(limit)}, of which {GPU_SHARE:.0%} can be "
        f"planned with: {_remedy(plan, GPU_SHARE * limit)}"
    )


def _remedy(plan: Plan, limit: float) -> str:
    """The first of a few changes, from harmless to slow, with which a rank takes at most ``limit`` bytes."""
    learner = plan.config.learner
    stages = [stage for stage in (2, 3) if stage > learner.zero_stage and learner.ranks > 1]
    sizes = [tokens for tokens in (16384, 8192, 4096, 2048) if tokens < learner.micro_batch_tokens]
    changes: list[dict[str, Any]] = [{"micro_batch_tokens": tokens} for tokens in sizes[:2]]
    changes += [{"gradient_checkpointing": True}] if not learner.gradient_checkpointing else []
    changes += [{"zero_stage": stage} for stage in stages]
    changes += [{"zero_stage": stage, "gradient_checkpointing": True} for stage in stages]
    changes += [
        {"zero_stage": max([*stages, learner.zero_stage]), "gradient_checkpointing": True, "micro_batch_tokens": tokens}
        for tokens in sizes
    ]
    for change in changes:
        total = _changed(plan, change)
        if total <= limit:
            settings = ", ".join(f"learner.{key}={str(value).lower()}" for key, value in change.items())
            return f"set {settings}, which needs {gib(total)}"
    return "take more learner.ranks with learner.zero_stage=3, a smaller rollout.max_model_len, or a smaller model"


def _changed(plan: Plan, change: dict[str, Any]) -> float:
    """Bytes of a learner rank with other settings."""
    config: RunConfig = replace(plan.config, learner=replace(plan.config.learner, **change))
    return memory_of_learner(config, plan.model, plan_batch.batch(config), on_gpu=plan.shape.on_gpu).total


def _engine_gpu(plan: Plan) -> Iterator[str]:
    """Weights and cache of an engine fit into its share of the GPU."""
    rollout, limit = plan.config.rollout, plan.shape.gpu_memory_bytes
    if limit is None or rollout.kv_cache_gb is None or plan.engine.total is None:
        return
    if plan.engine.total > GPU_SHARE * limit:
        yield (
            f"an engine needs {gib(plan.engine.total)} on each GPU, {gib(plan.engine.kv_cache or 0)} of it for "
            f"rollout.kv_cache_gb={rollout.kv_cache_gb:g}, and a GPU has {gib(limit)}: set rollout.kv_cache_gb=null, "
            f"or raise rollout.tensor_parallel_size={rollout.tensor_parallel_size}"
        )


def _shared_gpu(plan: Plan) -> Iterator[str]:
    """Where both take a fraction of a GPU, an engine and a learner rank fit into one together."""
    limit = plan.shape.gpu_memory_bytes
    parts = {kind.name: kind.gpus for kind in plan.actors}
    worker = max(gpus for name, gpus in parts.items() if name.startswith(WORKER))
    rank = parts["learner rank"]
    if limit is None or not (0 < worker < 1 and 0 < rank < 1 and worker + rank <= 1):
        return
    rollout = plan.config.rollout
    engine = rollout.gpu_memory_utilization * limit if rollout.kv_cache_gb is None else plan.engine.total or 0.0
    if plan.learner.total + engine > GPU_SHARE * limit:
        yield (
            f"a learner rank ({gib(plan.learner.total)}) and an engine ({gib(engine)}) share a GPU by learner.num_gpus="
            f"{rank:g} and rollout.num_gpus={worker:g}, and it has {gib(limit)}: set or lower rollout.kv_cache_gb, or "
            "give each a GPU of its own"
        )


def _kv_cache(plan: Plan) -> Iterator[str]:
    """The cache holds at least one trajectory; vLLM refuses to start otherwise."""
    rollout, engine = plan.config.rollout, plan.engine
    if engine.kv_tokens is None or engine.kv_tokens >= rollout.max_model_len:
        return
    need = engine.kv_token_bytes * rollout.max_model_len
    if rollout.kv_cache_gb is not None:
        fix = f"raise rollout.kv_cache_gb={rollout.kv_cache_gb:g} to {need / GIB:.3g} or more"
    else:
        fix = (
            f"raise rollout.tensor_parallel_size={rollout.tensor_parallel_size} or rollout.gpu_memory_utilization="
            f"{rollout.gpu_memory_utilization:g}"
        )
    yield (
        f"one trajectory of rollout.max_model_len={rollout.max_model_len} tokens needs {gib(need)} of KV cache and the "
        f"engine has {gib(max(engine.kv_cache or 0, 0))}: {fix}, or lower max_model_len"
    )


def _main_memory(plan: Plan) -> Iterator[str]:
    """Every machine has the memory that its actors take."""
    for number, host in enumerate(plan.hosts):
        if host.total > host.available:
            yield (
                f"machine {number + 1} would need {gib(host.total)} of main memory and has {gib(host.available)}: "
                f"{_memory_fix(plan)}"
            )


def _memory_fix(plan: Plan) -> str:
    config = plan.config
    if plan.shape.on_gpu:
        return "take more machines, fewer rollout.workers and learner.ranks on each, or a smaller model"
    kv = f"rollout.kv_cache_gb={config.rollout.kv_cache_gb:g}" if config.rollout.kv_cache_gb else "rollout.kv_cache_gb"
    return (
        f"lower rollout.workers={config.rollout.workers}, {kv} or learner.micro_batch_tokens="
        f"{config.learner.micro_batch_tokens}, set learner.gradient_checkpointing=true, or take a smaller model"
    )


def _bucket(plan: Plan) -> Iterator[str]:
    """A bucket of weights fits into the object store."""
    if plan.bucket_bytes > plan.store_bytes and not plan.config.fixed_fleet:
        fix = "raise ray.object_store_mb" if plan.private else "give Ray's object store more"
        yield (
            f"a bucket of weights takes {gib(plan.bucket_bytes)} and Ray's object store has {gib(plan.store_bytes)}: "
            f"lower learner.bucket_mb={plan.config.learner.bucket_mb:g}, or {fix}"
        )


def _idle(plan: Plan) -> Iterator[str]:
    """GPUs and machines that the run leaves unused."""
    taken = sum(kind.all_gpus for kind in plan.actors)
    if plan.placed is not None and taken < plan.shape.gpus:
        yield (
            f"{plan.shape.gpus - taken:g} of {plan.shape.gpus:g} GPUs stay idle: raise rollout.workers="
            f"{plan.config.rollout.workers} or learner.ranks={plan.config.learner.ranks}"
        )
    if plan.config.ray.address is None and len(plan.shape.machines) > 1:
        yield (
            f"ray.address=null starts a Ray on one machine only; set ray.address=auto to use all "
            f"{len(plan.shape.machines)} machines"
        )


def _book_keeping(plan: Plan) -> Iterator[str]:
    """A private Ray lets actors reserve more CPUs than there are."""
    cpus = plan.shape.machines[0].cpus
    if plan.private and plan.config.reserved_cpus > cpus:
        yield (
            f"workers and learner ranks reserve {plan.config.reserved_cpus:g} CPUs and the machine has {cpus:g}: they "
            "share them in turns; lower rollout.workers or learner.ranks"
        )


def _threads(plan: Plan) -> Iterator[str]:
    """On the CPU, threads beyond the cores only take turns."""
    rollout, learner = plan.config.rollout, plan.config.learner
    threads = rollout.workers * rollout.omp_threads + learner.ranks * learner.omp_threads
    if not plan.shape.on_gpu and threads > plan.shape.cpus:
        yield (
            f"engines and learner compute with {threads} threads and there are {plan.shape.cpus:g} CPUs: lower "
            f"rollout.omp_threads={rollout.omp_threads} or learner.omp_threads={learner.omp_threads}"
        )


def _kv_queue(plan: Plan) -> Iterator[str]:
    """The cache holds what a worker generates at the same time."""
    rollout, engine = plan.config.rollout, plan.engine
    if engine.kv_cache is None:
        if not plan.shape.on_gpu:
            yield "rollout.kv_cache_gb=null lets vLLM take most of the memory on a CPU; set it, to 0.25 for example"
        return
    wanted = rollout.group_size * rollout.groups_in_flight * rollout.max_model_len
    held = engine.kv_tokens or 0
    if rollout.max_model_len <= held < wanted:
        more = "raise rollout.kv_cache_gb or " if rollout.kv_cache_gb is not None else ""
        yield (
            f"the KV cache holds {held:,} tokens, and {rollout.groups_in_flight} groups in flight may need {wanted:,}: "
            f"some would wait, or be computed twice; {more}lower rollout.groups_in_flight"
        )


def _passes(plan: Plan) -> Iterator[str]:
    """Forward passes that are worth making."""
    learner, rollout, batch = plan.config.learner, plan.config.rollout, plan.batch
    if learner.micro_batch_tokens < rollout.max_model_len:
        yield (
            f"learner.micro_batch_tokens={learner.micro_batch_tokens} is less than rollout.max_model_len="
            f"{rollout.max_model_len}: a long trajectory gets a pass of its own, and memory is planned for it"
        )
    if batch.minibatch_groups * rollout.group_size < learner.ranks:
        yield (
            f"{batch.minibatch_groups * rollout.group_size} trajectories of an optimiser step for learner.ranks="
            f"{learner.ranks}: some ranks train nothing; raise learner.groups_per_step or lower learner.ranks"
        )


def _sharding(plan: Plan) -> Iterator[str]:
    learner = plan.config.learner
    if learner.ranks == 1 and learner.zero_stage > 0:
        yield f"learner.zero_stage={learner.zero_stage} shards nothing with learner.ranks=1; set it to 0"


def _mask(plan: Plan) -> Iterator[str]:
    if plan.shape.on_gpu and plan.learner.mask_bytes >= MASK_BYTES:
        yield (
            f"without flash attention, masks of {plan.batch.row_tokens:,}² take {gib(plan.learner.mask_bytes)}: "
            "install flash-attn, or lower learner.micro_batch_tokens"
        )


def _tight(plan: Plan) -> Iterator[str]:
    for number, host in enumerate(plan.hosts):
        if TIGHT * host.available < host.total <= host.available:
            yield (
                f"machine {number + 1} would use {gib(host.total)} of its {gib(host.available)} of main memory: "
                f"{_memory_fix(plan)}"
            )


def _spilling(plan: Plan) -> Iterator[str]:
    """Ray writes objects to disk when its store is nearly full."""
    need = VERSIONS_KEPT * plan.sync.num_bytes
    if plan.bucket_bytes <= plan.store_bytes < need / SPILL_SHARE and not plan.config.fixed_fleet:
        fix = f"raise ray.object_store_mb to {need / SPILL_SHARE / 2**20:,.0f}" if plan.private else "enlarge it"
        yield (
            f"{VERSIONS_KEPT} versions of the weights take {gib(need)} and Ray's object store has "
            f"{gib(plan.store_bytes)}, of which it fills {SPILL_SHARE:.0%}: the rest goes by way of the disk; {fix}"
        )


def _disk(plan: Plan) -> Iterator[str]:
    """The store may grow beyond the disk; checkpoints are counted by `preflight`."""
    bounded = plan.config.replay.capacity_gb or plan.config.replay.capacity_groups or plan.config.replay.evict_after_lag
    if plan.free_bytes is not None and not bounded and plan.growth.run_bytes > plan.free_bytes:
        yield (
            f"the replay store may grow to {gib(plan.growth.run_bytes)} and the disk has {gib(plan.free_bytes)} free: "
            "set replay.capacity_gb or replay.evict_after_lag"
        )
