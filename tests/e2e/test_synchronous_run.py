"""The whole stack at lag 0 is the synchronous on-policy algorithm: it equals the one-file reference, step for step."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from r2vpo.algorithm.reference import ReferenceTrainer
from r2vpo.job.config import load_config
from replay.service import SHARD
from replay.store import ReplayStore
from tests.e2e.runs import QUICKSTART, train

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
        # The bias of an attention key has no gradient at all (softmax does not see it), only rounding noise, which Adam
        # would scale up to full steps of either sign: an epsilon above the noise leaves it where it is.
        "learner.adam_eps=1e-6",
        "task.eval_prompts=16",
    )
    config = load_config(run / "config.yaml", [])
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    model.eval()
    reference = ReferenceTrainer(
        model,
        algorithm=config.algorithm,
        off_policy=False,
        lr=config.learner.lr,
        warmup_steps=config.learner.warmup_steps,
        weight_decay=config.learner.weight_decay,
        betas=(config.learner.adam_beta1, config.learner.adam_beta2),
        eps=config.learner.adam_eps,
        grad_clip=config.learner.grad_clip,
        minibatches=config.learner.minibatches,
        temperature=config.rollout.temperature,
        seed=config.seed,
    )
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(recorded) == STEPS
    store = ReplayStore.read_only(run / "replay" / SHARD)
    with closing(store):
        for step, metrics in enumerate(recorded):
            batch = store.committed_batch(step)
            assert {t.oldest_version for g in batch.groups for t in g.group.trajectories} == {step}
            expected = reference.step(batch)
            assert metrics["train/lag_max"] == 0
            assert metrics["step/loss"] == pytest.approx(expected["loss"], abs=1e-5)
            assert metrics["dual/second_moment"] == pytest.approx(expected["second_moment"], abs=1e-5)
            assert metrics["dual/lambda"] == pytest.approx(expected["lam"], abs=1e-4)
            # s follows the logarithm of V, whose terms (u - 1)² are small differences of log-probs.
            assert metrics["control/scale"] == pytest.approx(expected["step_scale"], rel=1e-3)
    trained = load_file(run / "model" / "model.safetensors")
    moved = 0.0
    base = load_file(QUICKSTART / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in trained:
            torch.testing.assert_close(trained[name], tensor, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
            moved = max(moved, float((tensor - base[name]).abs().max()))
    assert moved > 1e-4, "four steps must move the weights by far more than the tolerance"
