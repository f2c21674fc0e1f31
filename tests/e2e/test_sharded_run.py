"""The whole stack with two replay shards and prioritised replay: what it trained on is in the store, and trained so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from r2vpo.records import Kind, SampledBatch
from replay.reader import StoreReader
from replay.rows import by_shard, shard_of_key
from tests.e2e.redone import EXACTLY, check_redone
from tests.e2e.runs import train

pytestmark = pytest.mark.engine
STEPS = 6


def test_a_run_on_two_shards_with_weighted_draws_equals_the_reference_on_its_batches(tmp_path: Path):
    run = train(
        tmp_path,
        "replay.shards=2",
        "replay.sample=priority",
        f"learner.steps={STEPS}",
        "learner.groups_per_step=12",
        "learner.minibatches=3",
        "learner.checkpoint_every=0",
        "task.eval_prompts=16",
        "task.eval_every=3",
        *EXACTLY,
    )
    stale = []

    def look(batch: SampledBatch, metrics: dict[str, Any]) -> None:
        stale.extend(g for g in batch.groups if g.kind == Kind.STALE)
        assert sum(g.kind == Kind.FRESH for g in batch.groups) == 6
        assert metrics["train/stale_groups"] == sum(g.kind == Kind.STALE for g in batch.groups)

    check_redone(run, steps=STEPS, look=look, weights_within=1e-4)  # 18 steps of Adam on gradients equal to rounding
    assert all(g.uses > 0 and g.group.has_signal for g in stale)
    assert len({g.weight for g in stale}) > 1, "draws by priority have unequal weights"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # after versions 3 and 6, but the last one is evaluated at the end of every run
    assert [row["step"] for row in rows if "eval/accuracy" in row] == [2]
    assert 0 <= rows[2]["eval/accuracy"] <= 1
    with StoreReader(run / "replay") as store:
        assert list(store.verify()) == []
        assert store.version == STEPS
        shards = by_shard([g.group_id for step in range(STEPS) for g in store.batch(step).groups], 2)
        keys = {g.group_id: g.group.key for step in range(STEPS) for g in store.batch(step).groups}
    assert sorted(shards) == [0, 1]
    assert all(shard_of_key(keys[i], 2) == shard for shard, ids in shards.items() for i in ids)
    summary = json.loads((run / "summary.json").read_text())["replay"]
    assert (summary["shards"], summary["damaged"]) == (2, 0)
    assert summary["uses"] == {"fresh": 6 * STEPS, "stale": len(stale)}
