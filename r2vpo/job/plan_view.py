"""What ``r2vpo plan`` shows to people: sections of lines, coloured on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from r2vpo.job.plan_facts import Plan
from r2vpo.job.plan_host import Host, gib
from r2vpo.job.readings import describe
from r2vpo.job.replay_view import ACCENT, Column, size_text, table

Row = tuple[str, str]
"""A label and what is said of it."""
LABEL_WIDTH = 15
MOST_MACHINES = 8
"""Most machines that are listed one by one."""


def plan_lines(plan: Plan, problems: Sequence[str], warnings: Sequence[str], width: int | None) -> Iterator[Text]:
    """The whole plan; what cannot work stands last, where it is seen."""
    yield Text.assemble(("plan ", "dim"), (plan.config.name, f"bold {ACCENT}"), f"  {describe(plan.config)}")
    yield from _actors(plan, width)
    for title, rows in (
        ("one learner step", _step_rows(plan)),
        ("lag, in learner steps", _lag_rows(plan)),
        (_learner_title(plan), _learner_rows(plan)),
        (_engine_title(plan), _engine_rows(plan)),
        ("main memory", _host_rows(plan)),
        ("disk", _disk_rows(plan)),
        ("a weight sync", _sync_rows(plan)),
    ):
        yield from _section(title, rows)
    yield Text()
    for sentence in warnings:
        yield Text.assemble(("note    " if sentence in plan.notes else "warning ", "yellow"), sentence)
    for sentence in problems:
        yield Text.assemble(("cannot  ", "bold red"), sentence)
    if problems:
        yield Text(f"this run cannot work: {len(problems)} thing{'s' * (len(problems) != 1)} to change", "bold red")
    else:
        yield Text("this run can start", "bold green")


def _section(title: str, rows: Sequence[Row]) -> Iterator[Text]:
    yield Text()
    yield Text(title, style="bold")
    for label, text in rows:
        yield Text.assemble((f"  {label:<{LABEL_WIDTH}}", "dim"), text)


def _actors(plan: Plan, width: int | None) -> Iterator[Text]:
    shape, kinds = plan.shape, plan.actors
    yield Text()
    yield Text("actors", style="bold")
    columns = [
        Column(head="actor", cells=[kind.name for kind in kinds]),
        Column(head="number", cells=[str(kind.count) for kind in kinds], right=True),
        Column(head="CPUs each", cells=[f"{kind.cpus:g}" for kind in kinds], right=True),
        Column(head="GPUs each", cells=[f"{kind.gpus:g}" for kind in kinds], right=True),
        Column(head="machines", cells=[_machines(plan, kind.name) for kind in kinds], keep=1),
    ]
    for line in table(columns, None if width is None else width - 2):
        yield Text("  ") + line
    asked = ", ".join(
        f"{need:g} of {supply:g} {name}"
        for need, supply, name in (
            (sum(kind.all_cpus for kind in kinds), shape.cpus, "CPUs"),
            (sum(kind.all_gpus for kind in kinds), shape.gpus, "GPUs"),
        )
    )
    each = {gib(machine.memory_bytes) for machine in shape.machines}
    memory = f"{' or '.join(sorted(each))} of main memory{' each' * (len(shape.machines) > 1)}"
    gpu = "" if shape.gpu_memory_bytes is None else f", {gib(shape.gpu_memory_bytes)} per GPU"
    count = f"{len(shape.machines)} machine{'s' * (len(shape.machines) != 1)}"
    name = "" if shape.origin == "this machine" else f"{shape.origin}: "
    where = "this machine" if shape.origin == "this machine" else count
    yield Text.assemble((f"  {'reserved':<{LABEL_WIDTH}}", "dim"), asked)
    yield Text.assemble((f"  {'cluster':<{LABEL_WIDTH}}", "dim"), f"{name}{where}, {memory}{gpu}")


def _machines(plan: Plan, actor: str) -> str:
    """``1 (4), 2 (4)``: machines and how many of an actor each takes."""
    if plan.placed is None:
        return "no room"
    there = [(number + 1, placed[actor]) for number, placed in enumerate(plan.placed) if placed.get(actor)]
    if len(there) > MOST_MACHINES:
        return f"{len(there)} machines"
    return ", ".join(f"{number} ({count})" for number, count in there)


def _step_rows(plan: Plan) -> list[Row]:
    batch, config = plan.batch, plan.config
    steps, size = config.learner.steps, config.rollout.group_size
    prompts = steps * batch.fresh
    total = steps * batch.minibatches * batch.passes
    passes = f" in each of at most {batch.passes} passes" if batch.passes > 1 else ""
    epochs = "" if plan.num_prompts is None else f", {prompts / plan.num_prompts:.2g} epochs of {plan.num_prompts:,}"
    groups = batch.fresh + batch.stale
    return [
        (
            "prompts",
            f"{batch.fresh:,} new × rollout.group_size={size} = {batch.fresh * size:,} new trajectories",
        ),
        (
            "batch",
            f"{batch.fresh:,} fresh + {batch.stale:,} stale groups = {batch.trajectories:,} trajectories "
            f"≤ {batch.tokens:,} tokens",
        ),
        (
            "optimiser",
            f"{batch.minibatches} steps{passes}, each on {_upto(groups, batch.minibatches)} groups = "
            f"{batch.minibatch_groups * size:,} trajectories",
        ),
        (
            "micro-batches",
            f"{batch.micro_batches} per optimiser step on each of {config.learner.ranks} rank"
            f"{'s' * (config.learner.ranks != 1)}, of ≤ {batch.row_tokens:,} tokens",
        ),
        (
            "whole run",
            f"{steps:,} steps: {prompts:,} prompts{epochs}; {total:,} optimiser steps",
        ),
    ]


def _upto(total: int, parts: int) -> str:
    return f"{total // parts}" if total % parts == 0 else f"{total // parts} or {total // parts + 1}"


def _lag_rows(plan: Plan) -> list[Row]:
    lag, replay = plan.lag, plan.config.replay
    rows = [
        (
            "fresh",
            f"≤ {lag.fresh}: at most {plan.batch.fresh} × (replay.max_lag={replay.max_lag} + 1) = {lag.outstanding:,} "
            f"groups wait or are in flight; workers generate {lag.slots:,} at a time",
        )
    ]
    every = plan.config.learner.sync_every
    if every > 1:
        rows.append(("weights", f"published every {every} steps (learner.sync_every), so up to {every - 1} steps old"))
    if lag.stale is not None:
        rows.append(("stale", f"≤ {lag.stale} (replay.max_replay_lag)"))
    return rows


def _learner_title(plan: Plan) -> str:
    config, where = plan.config.learner, "its GPU" if plan.shape.on_gpu else "main memory"
    checkpointing = ", gradient checkpointing" if config.gradient_checkpointing else ""
    return f"memory of a learner rank in {where}: {plan.learner_dtype}, ZeRO stage {config.zero_stage}{checkpointing}"


def _learner_rows(plan: Plan) -> list[Row]:
    memory, batch = plan.learner, plan.batch
    attention = "flash attention" if plan.flash else f"{gib(memory.mask_bytes)} of it masks"
    rows = [
        ("weights", f"{gib(memory.weights)}, {plan.model.num_parameters:,} parameters"),
        ("gradients", gib(memory.gradients)),
        ("optimiser", gib(memory.optimizer)),
        ("buffers", f"{gib(memory.buffers)} for what travels between ranks"),
        (
            "activations",
            f"{gib(memory.activations)} of {plan.model.layers} layers × {batch.row_tokens:,} tokens, {attention}",
        ),
        ("logits", f"{gib(memory.logits)} of {batch.row_tokens:,} tokens × a vocabulary of {plan.model.vocabulary:,}"),
        ("together", _of(memory.total, plan.shape.gpu_memory_bytes)),
    ]
    return [row for row in rows if row[0] != "buffers" or memory.buffers]


def _engine_title(plan: Plan) -> str:
    tensor, where = plan.config.rollout.tensor_parallel_size, "main memory"
    if plan.shape.on_gpu:
        where = "its GPU" if tensor == 1 else f"each of its {tensor} GPUs"
    return f"memory of an engine in {where}: {plan.engine_dtype}"


def _engine_rows(plan: Plan) -> list[Row]:
    engine, rollout = plan.engine, plan.config.rollout
    kv = "what vLLM takes is not known here"
    if engine.kv_cache is not None and engine.kv_tokens is not None:
        most = "≤ " if rollout.kv_cache_gb is None else ""
        kv = (
            f"{most}{gib(engine.kv_cache)} = {engine.kv_tokens:,} tokens, or "
            f"{engine.kv_tokens // rollout.max_model_len:,} trajectories of {rollout.max_model_len:,}; in flight: "
            f"{rollout.group_size * rollout.groups_in_flight:,}"
        )
    rows = [
        ("weights", gib(engine.weights)),
        ("reload", f"{gib(engine.reload)} while a version is loaded"),
        ("KV cache", kv),
    ]
    if engine.total is not None:
        rows.append(("together", _of(engine.total, plan.shape.gpu_memory_bytes)))
    return rows


def _of(need: float, supply: float | None) -> str:
    return gib(need) if supply is None else f"{gib(need)} of {gib(supply)}"


def _host_rows(plan: Plan) -> list[Row]:
    """Machines that are alike share a row."""
    alike: dict[tuple[str, str], list[int]] = {}
    for number, host in enumerate(plan.hosts):
        alike.setdefault((_host_text(host), gib(host.available)), []).append(number + 1)
    rows = [
        (f"machine {_numbers(numbers)}", f"{text} of {available}")
        for (text, available), numbers in list(alike.items())[:MOST_MACHINES]
    ]
    return rows or [("", "not counted: the actors do not fit")]


def _host_text(host: Host) -> str:
    parts = (
        (host.processes, "processes"),
        (host.learners, "learner"),
        (host.engines, "engines"),
        (host.shared, "weights in shared memory"),
    )
    return " + ".join(f"{gib(size)} {name}" for size, name in parts if size) + f" = {gib(host.total)}"


def _numbers(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"


def _disk_rows(plan: Plan) -> list[Row]:
    growth, free = plan.growth, plan.free_bytes
    rows = [
        ("a group", f"≤ {size_text(growth.group_bytes)}, a learner step ≤ {size_text(growth.step_bytes)}"),
        (
            "per hour",
            f"≤ {size_text(round(growth.hour_bytes))}, if a learner step takes {growth.step_s:g} s (--step-s)",
        ),
        ("whole run", f"≤ {size_text(growth.run_bytes)}" + ("" if free is None else f"; {size_text(free)} free")),
    ]
    return rows


def _sync_rows(plan: Plan) -> list[Row]:
    sync = plan.sync
    how = "measured here" if sync.measured else "--bandwidth"
    return [
        ("weights", f"{size_text(round(sync.num_bytes))} at {sync.bandwidth / 1e9:.1f} GB/s ({how})"),
        ("publish", f"≥ {_seconds(sync.publish_s)}, the learner waits"),
        ("fetch", f"≥ {_seconds(sync.fetch_s)}, workers go on"),
        ("load", f"≥ {_seconds(sync.pause_s)}, generation pauses"),
    ]


def _seconds(value_s: float) -> str:
    return f"{value_s:.1f} s" if value_s >= 0.95 else f"{max(1, round(1000 * value_s))} ms"
