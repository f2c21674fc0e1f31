"""The control run: at learning rate 0 nothing may move, so whatever does is a fault of the machinery."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from r2vpo.job.tracking import read_metrics
from tests.e2e.runs import QUICKSTART, train

pytestmark = [pytest.mark.engine, pytest.mark.slow]
ROUNDING = 2e-5
"""Engine and learner both compute in float32, in another order (nats)."""


def test_at_learning_rate_0_every_sync_has_the_same_gap_and_the_model_stays_as_it_is(tmp_path: Path):
    run = train(tmp_path, "learner.lr=0", "learner.steps=3", "task.eval_prompts=8")
    metrics = read_metrics(run / "metrics.jsonl")
    gaps = [m["sync/canary_gap"] for m in metrics if m["sync/canary_gap"] is not None]
    assert gaps, "no sync was seen"
    assert max(gaps) < ROUNDING
    before, after = load_file(QUICKSTART / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
