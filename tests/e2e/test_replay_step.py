"""Time travel: a learner step is computed again from what the run left, and gives the numbers that were recorded."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from replay.consumption import ConsumptionLog
from replay.rows import shard_of_id
from replay.schema import CONSUMPTION_FILE, shard_file
from tests.e2e.runs import REPOSITORY, train

pytestmark = pytest.mark.engine
SHARDS = 2
SETTINGS = (
    "learner.ranks=2",
    "learner.zero_stage=2",
    "learner.groups_per_step=8",
    "learner.minibatches=2",
    "learner.checkpoint_every=3",
    "learner.keep_checkpoints=2",
    f"replay.shards={SHARDS}",
    "replay.sample=priority",
    "task.eval_prompts=8",
)


def replay_step(run: Path, step: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r2vpo", "replay-step", str(run), "--step", str(step), "--json"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def recomputed(run: Path, step: int) -> dict[str, Any]:
    """The result of a recomputation that must succeed."""
    done = replay_step(run, step)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


def contents(run: Path) -> dict[str, bytes]:
    """Every file of the run."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def damage(run: Path, group_ids: Sequence[int]) -> None:
    """Turn the last byte of the groups' payloads around."""
    for group_id in group_ids:
        path = run / "replay" / shard_file(shard_of_id(group_id, SHARDS))
        with closing(sqlite3.connect(path)) as db, db:
            (payload,) = db.execute("SELECT payload FROM payloads WHERE group_id = ?", (group_id,)).fetchone()
            changed = payload[:-1] + bytes([payload[-1] ^ 1])
            db.execute("UPDATE payloads SET payload = ? WHERE group_id = ?", (changed, group_id))


def test_steps_are_computed_again_exactly_across_a_resume_with_other_settings(tmp_path: Path):
    train(tmp_path, *SETTINGS, "learner.steps=4")
    run = train(tmp_path, *SETTINGS, "learner.steps=7", "learner.lr=3e-4", "--resume", "--allow-change", "learner.lr")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000006", "step-000007"]
    before = contents(run)

    # No checkpoint is old enough: from the model itself, with the settings of the first start, then of the second.
    through_all = recomputed(run, 5)
    assert through_all["origin"] is None
    assert [(s["step"], s["same"]) for s in through_all["steps"]] == [(step, True) for step in range(6)]
    # Optimiser, λ and step size from a checkpoint.
    from_checkpoint = recomputed(run, 6)
    assert from_checkpoint["origin"].endswith("step-000006")
    assert [(s["step"], s["same"]) for s in from_checkpoint["steps"]] == [(6, True)]

    metrics = from_checkpoint["metrics"]
    assert {"step/loss", "step/grad_norm", "dual/second_moment", "dual/lambda", "train/tokens"} <= metrics.keys()
    assert metrics["train/stale_groups"]["recorded"] == 4
    assert metrics["dual/second_moment"]["recorded"] > 0
    for name, reading in metrics.items():
        assert reading["recomputed"] == pytest.approx(reading["recorded"], rel=1e-6, abs=1e-9), name
    assert from_checkpoint["notes"] == []
    assert contents(run) == before, "nothing is written into the run's folder"

    with closing(ConsumptionLog(run / "replay" / CONSUMPTION_FILE, read_only=True)) as log:
        group_id = log.plan(6).group_ids[0]
    damage(run, [group_id])
    done = replay_step(run, 6)
    assert done.returncode == 2
    assert f"group {group_id}" in done.stderr
    assert "Traceback" not in done.stderr
