"""``r2vpo plan CONFIG``: what a run will do, need and take, before anything starts. Nothing is created.

    settings ──┬─▶ batch, lag, growth of the store                 (plan_batch)
    config.json ─▶ model's shape ──▶ memory of learner and engine  (plan_find, plan_model, plan_memory)
    machines ──┴─▶ who runs where, main memory of each machine     (plan_cluster, plan_place, plan_host)
                        ──▶ Plan ──▶ problems, warnings ──▶ lines  (plan_facts, plan_checks, plan_view)

See docs/plan.md.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r2vpo.job import plan_cluster
from r2vpo.job.config import ConfigError, RunConfig, load_config
from r2vpo.job.plan_checks import problems, warnings
from r2vpo.job.plan_cluster import Shape
from r2vpo.job.plan_facts import Plan, plan_facts
from r2vpo.job.plan_find import find_model
from r2vpo.job.plan_sync import copy_bandwidth
from r2vpo.job.plan_view import plan_lines
from r2vpo.job.preflight import preflight
from r2vpo.job.replay_view import Screen

EXAMPLES = """\
examples:
  r2vpo plan configs/quickstart.yaml
  r2vpo plan configs/quickstart.yaml learner.micro_batch_tokens=65536 --json
  r2vpo plan configs/math-qwen-1.5b.yaml --cluster nodes=1,gpus=8,cpus=96,memory_gb=1000,gpu_memory_gb=80

exit code: 0 the run can start, 2 it cannot work
"""
CAN, CANNOT = 0, 2
STEP_S = 60.0
"""Seconds of a learner step that the growth per hour assumes unless told."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``r2vpo plan`` takes besides the config file and its overrides."""
    parser.add_argument(
        "--cluster",
        metavar="SHAPE",
        help="machines that are not here: nodes=2,gpus=8,cpus=96,memory_gb=1000,gpu_memory_gb=80 (of each node; GiB)",
    )
    parser.add_argument(
        "--bandwidth", type=_positive, metavar="GB/S", help="speed at which weights are copied; measured if not given"
    )
    parser.add_argument(
        "--step-s",
        type=_positive,
        default=STEP_S,
        metavar="S",
        help=f"seconds of a learner step, for the growth per hour ({STEP_S:g})",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit code: 0 the run can start, 2 it cannot work.

    ``ConfigError`` if the settings, the model or the machines cannot be read.
    """
    config = load_config(arguments.config, arguments.overrides)
    try:
        shape = None if arguments.cluster is None else plan_cluster.simulated(arguments.cluster)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    bandwidth = None if arguments.bandwidth is None else arguments.bandwidth * 1e9
    plan = make_plan(config, shape, bandwidth=bandwidth, step_s=arguments.step_s)
    if arguments.json:
        print(json.dumps(as_json(plan), indent=2, ensure_ascii=False))
    else:
        screen = Screen()
        screen.say(plan_lines(plan, problems(plan), warnings(plan), screen.width))
    return CANNOT if problems(plan) else CAN


def make_plan(
    config: RunConfig, shape: Shape | None, *, bandwidth: float | None = None, step_s: float = STEP_S
) -> Plan:
    """The plan of ``config`` on ``shape``, by default on the machines that ``train`` would take.

    ``bandwidth`` in bytes per second; None measures it. ``ConfigError`` as in ``run``.
    """
    elsewhere = shape is not None
    dataset_is_here = config.task.path is None or Path(config.task.path).exists()
    facts = preflight(config) if not elsewhere and dataset_is_here else None
    if shape is None:
        shape = plan_cluster.local() if config.ray.address is None else plan_cluster.joined(config.ray)
    model, notes = find_model(config.model.path, elsewhere=elsewhere)
    notes += () if facts is None else facts.notes
    if not dataset_is_here:
        notes.append(f"task.path={config.task.path} is not here: the run reads it when it starts")
    if shape.on_gpu and shape.gpu_memory_bytes is None:
        notes.append("Ray does not say how much memory its GPUs have, so theirs is not checked: --cluster can say it")
    return plan_facts(
        config,
        shape,
        model,
        bandwidth=bandwidth or copy_bandwidth(),
        measured=bandwidth is None,
        step_s=step_s,
        num_prompts=None if facts is None else facts.num_prompts,
        free_bytes=None if facts is None else facts.free_bytes,
        notes=notes,
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON value; sizes in bytes, times in seconds."""
    return {
        "run": plan.config.name,
        "can_start": not problems(plan),
        "problems": problems(plan),
        "warnings": warnings(plan),
        "cluster": asdict(plan.shape),
        "actors": [asdict(kind) for kind in plan.actors],
        "placed": plan.placed,
        "model": asdict(plan.model),
        "batch": asdict(plan.batch),
        "lag": asdict(plan.lag),
        "learner": {"dtype": plan.learner_dtype, "total": plan.learner.total, **asdict(plan.learner)},
        "engine": {
            "dtype": plan.engine_dtype,
            "total": plan.engine.total,
            "kv_tokens": plan.engine.kv_tokens,
            **asdict(plan.engine),
        },
        "main_memory": [{"total": host.total, **asdict(host)} for host in plan.hosts],
        "object_store": plan.store_bytes,
        "disk": {**asdict(plan.growth), "free": plan.free_bytes, "prompts": plan.num_prompts},
        "sync": {
            **asdict(plan.sync),
            "publish_s": plan.sync.publish_s,
            "fetch_s": plan.sync.fetch_s,
            "pause_s": plan.sync.pause_s,
        },
    }


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0")
    return value
