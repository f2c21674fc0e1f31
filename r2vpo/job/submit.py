"""``r2vpo submit CONFIG``: give a run to a cluster through Ray's job server, from any machine that reaches it.

    CONFIG ──checked here──▶ code + inputs ──job server──▶ head node: r2vpo train, with ray.address=auto

See docs/job.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from r2vpo.job.config import RunConfig, load_config
from r2vpo.job.job_server import DEFAULT_ADDRESS, RUN, RUN_DIR, JobServer
from r2vpo.job.replay_view import size_text
from r2vpo.job.seal import seal
from r2vpo.job.settings import ConfigError, load
from r2vpo.job.shipment import PATH_KEYS, Inputs, gather, ship_code, ship_inputs

CLUSTER_RUNS = "~/r2vpo-runs"
"""Folder of the runs on the head node where the config names none that is absolute."""

EXAMPLES = """\
examples:
  r2vpo submit configs/quickstart.yaml --address http://127.0.0.1:8265
  r2vpo submit mine.yaml --address head:8265 run_dir=/runs rollout.workers=8 --env WANDB_API_KEY
  r2vpo submit mine.yaml --address head:8265 model.path=/models/Qwen2.5-7B --there model.path
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``r2vpo submit`` besides CONFIG and settings."""
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS),
        metavar="URL",
        help=f"Ray's job server (RAY_API_SERVER_ADDRESS, or {DEFAULT_ADDRESS})",
    )
    parser.add_argument(
        "--there",
        action="append",
        choices=PATH_KEYS,
        default=[],
        metavar="KEY",
        help=f"the path of this setting is the cluster's: do not bring along what lies here ({', '.join(PATH_KEYS)})",
    )
    add_job_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, one line")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What a job needs that trains."""
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="give the driver this environment variable of ours, such as WANDB_API_KEY; no other is passed on",
    )
    add_python_argument(parser)


def add_python_argument(parser: argparse.ArgumentParser) -> None:
    """Which Python runs a job."""
    parser.add_argument(
        "--python", default="python", metavar="PATH", help="Python of the head node, if not the first on its PATH"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, pack, submit; returns 0. ``ConfigError`` for what the user can put right."""
    config = cluster_config(arguments.config, arguments.overrides)
    env_vars = passed_on(arguments.env)
    inputs = gather(config, there=frozenset(arguments.there))
    _check_task(inputs, config)
    server = JobServer(arguments.address)
    for known in server.jobs():
        if known.run == config.name:
            raise ConfigError(
                f"name={config.name} is taken by job {known.job} at {server.address}; choose another with name=…, or "
                f"go on with r2vpo resume {config.name} --address {server.address}"
            )
    with tempfile.TemporaryDirectory(prefix="r2vpo-ship-") as folder:
        sealed, pad = seal(env_vars, Path(folder))
        job = server.submit(
            ["r2vpo.job.arrive"],
            name=config.name,
            modules=[*ship_code(Path(folder)), ship_inputs(inputs, Path(folder)), *pad],
            metadata={RUN: config.name, RUN_DIR: config.run_dir},
            env_vars=sealed,
            python=arguments.python,
        )
    sizes = {key: size_text(size) for key, size in inputs.num_bytes.items()}
    say_submitted(server, run=config.name, run_dir=config.run_dir, job=job, brought=sizes, as_json=arguments.json)
    return 0


def cluster_config(path: Path, overrides: list[str]) -> RunConfig:
    """The config as the cluster is to have it: its runs in a folder of the head node, its Ray the cluster's."""
    config = load_config(path, overrides)
    given = load(RunConfig, path, overrides).run_dir
    run_dir = given if given.startswith(("/", "~")) else CLUSTER_RUNS
    return replace(
        config, run_dir=run_dir, ray=replace(config.ray, address="auto", num_cpus=None, object_store_mb=None)
    )


def passed_on(names: list[str]) -> dict[str, str]:
    """Environment variables by name. ``ConfigError`` if one is not set here."""
    for name in names:
        if name not in os.environ:
            raise ConfigError(f"--env {name}: it is not set here; export it first")
    return {name: os.environ[name] for name in names}


def say_submitted(
    server: JobServer, *, run: str, run_dir: str, job: str, brought: dict[str, str], as_json: bool
) -> None:
    """Print the job's id, where the run will be, and what to do next."""
    if as_json:
        print(json.dumps({"run": run, "job": job, "address": server.address, "run_dir": run_dir, "brought": brought}))
        return
    print(f"run {run} is job {job} at {server.address}")
    print(f"  in {run_dir}/{run} on the head node")
    if brought:
        print(f"  brought along: {', '.join(f'{key} ({size})' for key, size in brought.items())}")
    for command in ("status {}", "logs {} --follow", "scale {} --rollout N", "stop {}", "resume {}"):
        print(f"r2vpo {command.format(run)} --address {server.address}")


def _check_task(inputs: Inputs, config: RunConfig) -> None:
    """Read the data that is here, so that a mistake is told now and not by the cluster."""
    from rollout.tasks.factory import make_task

    if config.task.path is None or "task.path" in inputs.sources:
        try:
            make_task(config.task, seed=config.seed)
        except ValueError as error:
            raise ConfigError(str(error)) from error
