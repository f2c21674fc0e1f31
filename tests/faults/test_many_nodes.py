"""A run on several Ray nodes of this machine, one of which is killed and another joins, or is cut off and comes back.

The run goes on all the while and is stopped in the end; an independent reader of its files finds no fault.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from r2vpo.cli import main
from r2vpo.job import status
from r2vpo.job.status import ComponentStatus
from tests.faults.nodes import Island, Nodes, ray_nodes, until
from tests.faults.victims import Run

pytestmark = [pytest.mark.engine, pytest.mark.faults, pytest.mark.slow]
SETTINGS = (
    "task.eval_prompts=16",
    "learner.steps=100000",
    "learner.checkpoint_every=10",
    "learner.resources={learner: 1}",
    "rollout.workers=2",
    "rollout.resources={rollout: 1}",
    "ray.object_store_mb=null",
    "supervisor.silent_s=20",
    "supervisor.backoff_s=0.5",
    "supervisor.max_restarts=5",
)


def components(run: Run, role: str) -> list[ComponentStatus]:
    said = status.read(run.folder / "status.json")
    return [c for c in said.components if c.role == role] if said else []


def serving(run: Run) -> list[ComponentStatus]:
    """Rollout workers with proven weights."""
    return [c for c in components(run, "rollout") if c.state == "serving" and c.version is not None]


def await_serving(run: Run, count: int) -> None:
    """Return once so many workers serve."""

    def holds() -> bool:
        assert run.exit_code is None, run.printed()
        return len(serving(run)) == count

    until(holds, f"{count} workers")


def check_end(run: Run, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """A few steps later the run is stopped, and its files are whole; returns its summary."""
    run.await_steps(len(run.steps()) + 2)
    assert main(["stop", str(run.folder), "--no-wait"]) == 0
    code, output = run.end()
    assert code == 130, output
    assert "Traceback" not in output
    capsys.readouterr()
    assert main(["replay", "verify", "--deep", str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["violations"] == []
    summary = run.summary()
    assert run.steps() == list(range(summary["steps"]))
    return summary


def test_a_whole_node_is_killed_and_a_new_one_joins(tmp_path: Path, capsys):
    """Ranks of ZeRO 2 on two of four nodes, workers on the two others, and shards on two."""
    with ray_nodes() as nodes:
        nodes.head(learner=1)
        nodes.join(learner=1)
        rollout = [nodes.join(rollout=1), nodes.join(rollout=1)]
        run = start(tmp_path, nodes, "replay.shards=2", "learner.ranks=2", "learner.zero_stage=2")
        await_serving(run, 2)
        run.await_steps(5)
        spread = {role: {c.node_id for c in components(run, role)} for role in ("learner", "rollout", "shard")}
        assert all(len(found) == 2 for found in spread.values()), spread
        assert spread["learner"].isdisjoint(spread["rollout"])
        lost = next(w for w in serving(run) if w.node_id not in spread["shard"])
        next(node for node in rollout if not node.runs("ray::ShardHost")).kill()
        run.await_output(rf"note: {lost.name} .*; replacing it \(1 of 5")
        run.await_steps(len(run.steps()) + 2)  # the other worker feeds the learner alone
        nodes.join(rollout=1)
        await_serving(run, 2)
        assert {w.node_id for w in serving(run)}.isdisjoint({lost.node_id})
        summary = check_end(run, capsys)
    assert summary["restarts"] == {"rollout": 1, "learner": 0, "shard": 0, "job": 0}


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2")
def test_a_node_is_cut_off_for_longer_than_the_heartbeat_and_comes_back(tmp_path: Path, capsys):
    """The cut node's worker generates on, and is replaced; with the cable in again, nothing of it is taken twice."""
    island = Island()
    try:
        with ray_nodes(island.shore) as nodes:
            nodes.head(learner=1, rollout=1)
            far = nodes.join(island=island, rollout=1)
            run = start(tmp_path, nodes)
            await_serving(run, 2)
            run.await_steps(5)
            island.cut()
            run.await_output(r"note: rollout-\d .*; replacing it \(1 of 5")
            run.await_steps(len(run.steps()) + 2)
            assert len(serving(run)) == 1
            assert not far.has_ended, "its machine knows of nothing"
            island.heal()
            until(lambda: far.has_ended, "end of the node that Ray has given up")
            nodes.join(island=island, rollout=1)  # as whoever supervises the machine's raylet does
            await_serving(run, 2)
            summary = check_end(run, capsys)
    finally:
        island.close()
    assert summary["restarts"]["rollout"] >= 1
    assert (summary["restarts"]["learner"], summary["restarts"]["job"]) == (0, 0)


def test_a_pool_of_rented_machines_is_scaled_dies_and_comes_back(tmp_path: Path, capsys):
    """One pool that asks for a resource, and one that asks for labelled nodes, whose deaths are expected."""
    rented_ask = "rented: {workers: 1, labels: {market: spot}, spot: true}"
    pools = f"rollout.pools={{own: {{workers: 1, resources: {{own: 1}}}}, {rented_ask}}}"
    with ray_nodes() as nodes:
        nodes.head(learner=1, own=1)
        rented = nodes.join("market=spot", rollout=2)
        run = start(tmp_path, nodes, pools, "supervisor.max_restarts=1")
        await_serving(run, 2)
        homes = {worker.pool: worker.node_id for worker in serving(run)}
        assert homes.keys() == {"own", "rented"}
        assert homes["own"] != homes["rented"]
        assert main(["scale", str(run.folder), "--rollout", "2", "--pool", "rented"]) == 0
        await_serving(run, 3)
        assert [w.node_id for w in serving(run) if w.pool == "rented"] == [homes["rented"]] * 2
        rented.kill()  # two deaths at once, where one is allowed
        run.await_output("machines of its pool come and go")
        run.await_steps(len(run.steps()) + 2)
        nodes.join(rollout=2)  # a machine that is not one of them
        until(lambda: all(w.state == "starting" for w in rented_workers(run)), "two that wait for a machine")
        nodes.join("market=spot", rollout=2)
        await_serving(run, 3)
        assert {w.node_id for w in rented_workers(run)}.isdisjoint(homes.values())
        summary = check_end(run, capsys)
    assert summary["restarts"] == {"rollout": 2, "learner": 0, "shard": 0, "job": 0}


def rented_workers(run: Run) -> list[ComponentStatus]:
    return [worker for worker in components(run, "rollout") if worker.pool == "rented"]


def start(folder: Path, nodes: Nodes, *settings: str) -> Run:
    return Run(folder, *SETTINGS, f"ray.address={nodes.address}", *settings)
