"""A run on four Ray nodes of this machine is scaled from one rollout worker to three and back, and loses a node.

    head: driver, replay actor    node 1: learner rank    nodes 1 to 3: rollout workers    shards on the head and node 1

Nodes here are Ray's (a raylet each, with an object store of its own); they share this machine's cores, so that tokens
per second need not follow the number of workers. What must follow is who serves. A new worker is held against an engine
that is started cold beside the same run, right before: both have what the run leaves of the cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from ray.cluster_utils import Cluster

from benchmarks.table import QUICK, REPOSITORY, Row, at_least, at_most, emit, reported
from r2vpo.job import status
from r2vpo.job.mailbox import ask_run
from r2vpo.job.replay_audit import audit_run
from r2vpo.job.rundir import RunDir
from r2vpo.job.status import ComponentStatus

RECIPE = "configs/quickstart.yaml"
WAIT_S = 300.0
"""Longest wait for a change (seconds)."""
SETTLE_STEPS = 5 if QUICK else 20
"""Learner steps at each size."""
NODE_MB = 150
"""Object store of one node (MiB)."""
NICENESS = os.environ.get("RAY_worker_niceness", "15")  # noqa: SIM112 - as Ray spells it
"""Of Ray's worker processes, which share the cores with the engine that is measured beside them."""


def measure() -> Iterator[Row]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": NODE_MB << 20},
    )
    try:
        nodes = [cluster.add_node(num_cpus=2, object_store_memory=NODE_MB << 20) for _ in range(3)]
        with tempfile.TemporaryDirectory() as folder:
            yield from scaled(Path(folder), cluster, nodes)
    finally:
        cluster.shutdown()


def scaled(folder: Path, cluster: Cluster, nodes: list) -> Iterator[Row]:
    """One run: 1 → 3 → 1 workers, a node that dies, a node that joins, and the end."""
    began_s = time.monotonic()
    run, process = start(folder, cluster.address)
    until(lambda: workers(run), "first worker")
    launched_s = time.monotonic()
    await_workers(run, 1)
    cold_s = time.monotonic() - launched_s
    yield reported("scale: the run's first worker, launch to proven weights", cold_s, "s")
    await_steps(run, SETTLE_STEPS)
    alone = rates(run, SETTLE_STEPS)
    num_quiet = len(rows(run)) - 1  # but for the first step, which warms up

    engine_s = cold_engine()
    num_beside = len(rows(run)) + 1  # with the step that was under way
    yield reported("scale: cold engine beside the run, new process to first token", engine_s, "s")
    asked_s = time.monotonic()
    ask_run(run, "scale", within_s=30, rollout=2)
    await_workers(run, 2)
    added_s = time.monotonic() - asked_s
    yield reported("scale: new worker, command to proven weights", added_s, "s")
    yield at_most("scale: command to a new worker's proven weights ÷ cold engine", added_s / engine_s, "", 1.2)
    asked_s = time.monotonic()
    ask_run(run, "scale", within_s=30, rollout=3)
    await_workers(run, 3)
    yield at_least("scale: workers that serve after 1 → 3", len(ready(run)), "workers", 3)
    at = len(rows(run))
    await_steps(run, at + SETTLE_STEPS)
    three = rates(run, SETTLE_STEPS)
    yield reported("scale: tokens per second, 3 workers ÷ 1", three["tokens"] / alone["tokens"], "")

    asked_s = time.monotonic()
    ask_run(run, "scale", within_s=30, rollout=1)
    await_workers(run, 1)
    yield reported("scale: 3 to 1, command to the end of the last one drained", time.monotonic() - asked_s, "s")
    await_steps(run, len(rows(run)) + SETTLE_STEPS)
    pause_s = max(row["sync/pause_s"] or 0.0 for row in rows(run))
    busy_s = [row["time/step_s"] - row["time/wait_s"] for row in rows(run)[1:]]
    excess = "longest learner step without its wait, less the median, ÷ longest sync"
    yield reported("scale: longest sync", pause_s, "s")
    yield reported(f"scale: before anything was scaled, {excess}", beyond_median(busy_s[:num_quiet]) / pause_s, "")
    beside_s = busy_s[:num_beside]
    yield reported(f"scale: until the cold engine beside it was up, {excess}", beyond_median(beside_s) / pause_s, "")
    yield at_most(f"scale: {excess}", beyond_median(busy_s) / pause_s, "", 1.0)

    ask_run(run, "scale", within_s=30, rollout=2)
    await_workers(run, 2)
    lost = next(node for node in nodes if has_only_workers(run, node.node_id))
    asked_s = time.monotonic()
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(num_cpus=2, object_store_memory=NODE_MB << 20)
    until(
        lambda: len(ready(run)) == 2 and any(c.restarts for c in workers(run)),
        "replacement for the worker of the lost node",
    )
    yield reported("scale: a node dies, another joins: until its worker is replaced", time.monotonic() - asked_s, "s")
    await_steps(run, len(rows(run)) + SETTLE_STEPS)
    ask_run(run, "stop", within_s=30)
    process.wait(WAIT_S)
    yield from accounts(run, process.returncode)
    yield reported("scale: the whole", time.monotonic() - began_s, "s")


def cold_engine() -> float:
    """Seconds that an engine of the same recipe takes from a new process to its first token."""
    began_s = time.monotonic()
    command = ["nice", "-n", NICENESS, sys.executable, "-m", "benchmarks.cluster.engine", RECIPE]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if not any(line.startswith("served") for line in process.stdout):
            raise RuntimeError(f"{' '.join(command)} did not serve")
        return time.monotonic() - began_s


def beyond_median(seconds: list[float]) -> float:
    return max(seconds) - median(seconds)


def start(folder: Path, address: str) -> tuple[RunDir, subprocess.Popen]:
    settings = (
        f"run_dir={folder}",
        "name=run",
        "tracking.wandb=off",
        "task.eval_prompts=16",
        "learner.steps=100000",
        "learner.checkpoint_every=20",
        f"ray.address={address}",
        "ray.object_store_mb=null",
        "replay.shards=2",
        "rollout.groups_in_flight=8",
    )
    command = [sys.executable, "-m", "r2vpo", "train", RECIPE, *settings]
    log = (folder / "output").open("w")
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, env=dict(os.environ))
    return RunDir(folder / "run"), process


def accounts(run: RunDir, code: int) -> Iterator[Row]:
    """What the run's files say of it."""
    audit = audit_run(run)
    for violation in audit.violations:
        print(violation.sentence, file=sys.stderr)
    steps = [row["step"] for row in rows(run)]
    yield at_most("scale: run stopped as asked (exit code 130)", float(code != 130), "other ends", 0)
    yield at_most("scale: steps missing or twice", float(steps != list(range(len(steps)))), "", 0)
    yield at_most("scale: groups lost, repeated or out of bounds", len(audit.violations), "violations", 0)


def rows(run: RunDir) -> list[dict]:
    text = run.metrics.read_text() if run.metrics.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def rates(run: RunDir, last: int) -> dict[str, float]:
    """Means over the last steps."""
    some = rows(run)[-last:]
    seconds = sum(row["time/step_s"] for row in some)
    return {"tokens": sum(row["rollout/tokens_per_s"] * row["time/step_s"] for row in some) / seconds}


def workers(run: RunDir) -> list[ComponentStatus]:
    said = status.read(run.status)
    return [c for c in said.components if c.role == "rollout"] if said else []


def ready(run: RunDir) -> list[ComponentStatus]:
    """Workers that take prompts: their weights are proven. Whether they have one just now is the learner's pace."""
    return [c for c in workers(run) if c.state == "serving" and c.version is not None]


def has_only_workers(run: RunDir, node_id: str) -> bool:
    """Whether a node has a rollout worker, and neither learner nor shard."""
    said = status.read(run.status)
    assert said is not None
    roles = {c.role for c in said.components if c.node_id == node_id}
    return roles == {"rollout"}


def await_workers(run: RunDir, count: int) -> None:
    """Return once ``count`` workers take prompts, and nobody else is there."""
    until(lambda: len(ready(run)) == len(workers(run)) == count, f"{count} workers")


def await_steps(run: RunDir, count: int) -> None:
    until(lambda: len(rows(run)) >= count, f"{count} steps")


def until(holds: Callable[[], object], what: str) -> None:
    until_s = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > until_s:
            raise RuntimeError(f"no {what} within {WAIT_S:g} s")
        time.sleep(0.1)


if __name__ == "__main__":
    emit(measure())
