"""The whole stack at lag 0 is the synchronous on-policy algorithm: it equals the one-file reference, step for step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from r2vpo.records import SampledBatch
from tests.e2e.redone import EXACTLY, check_redone
from tests.e2e.runs import train

pytestmark = pytest.mark.engine
STEPS = 4


def test_a_run_at_lag_0_equals_the_synchronous_reference(tmp_path: Path):
    run = train(
        tmp_path,
        "replay.max_lag=0",
        "replay.stale_fraction=0",
        f"learner.steps={STEPS}",
        "learner.groups_per_step=8",
        "learner.minibatches=4",
        "learner.checkpoint_every=0",
        "task.eval_prompts=16",
        *EXACTLY,
    )

    def look(batch: SampledBatch, metrics: dict[str, Any]) -> None:
        assert {t.oldest_version for g in batch.groups for t in g.group.trajectories} == {batch.step}
        assert metrics["train/lag_max"] == 0

    check_redone(run, steps=STEPS, look=look)
