"""A run with a learning rate of 0: whatever moves in it is a fault of measurement, transport or rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.runs import QUICKSTART, train

pytestmark = [pytest.mark.engine, pytest.mark.slow]
STEPS = 6
SETTINGS = (
    f"learner.steps={STEPS}",
    "learner.lr=0",
    "learner.weight_decay=0.1",
    "learner.checkpoint_every=2",
    "learner.keep_checkpoints=1",
    "learner.keep_every=4",
    "learner.groups_per_step=8",
    "learner.minibatches=2",
    "task.eval_prompts=16",
)


def test_without_a_learning_rate_the_canary_gap_is_constant_and_nothing_moves(tmp_path: Path):
    run = train(tmp_path, *SETTINGS)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["learner/optimizer_steps"] for m in metrics] == [2] * STEPS
    assert max(m["dual/second_moment_max"] for m in metrics) < 1e-9  # the engine's rounding against the learner's
    assert {(m["control/scale"], m["dual/lambda"], m["step/lr"]) for m in metrics} == {(1.0, 0.5, 0.0)}
    gaps = [m["sync/canary_gap"] for m in metrics if m["sync/canary_gap"] is not None]
    assert len(gaps) >= 3
    assert max(gaps) - min(gaps) < 1e-6
    base, trained = load_file(QUICKSTART / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in trained.items())
    # Checkpoints at 2, 4 and 6: the newest, and the multiple of 4; only the writing before a line is in that line.
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert [m["time/save_s"] > 0 for m in metrics] == [False, False, True, False, True, False]
