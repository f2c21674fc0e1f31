"""A run redone by the one-file reference on the batches that the run's store has kept, and compared step for step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from r2vpo.algorithm.reference import ReferenceTrainer
from r2vpo.job.config import RunConfig, load_config
from r2vpo.records import SampledBatch
from replay.reader import StoreReader
from tests.e2e.runs import QUICKSTART

EXACTLY = (
    # The bias of an attention key has no gradient at all (softmax does not see it), only rounding noise, which Adam
    # would scale up to full steps of either sign, and noise is part of every tiny gradient: an epsilon far above it.
    "learner.adam_eps=1e-5",
)
"""Settings with which a run can be redone to rounding."""


def check_redone(
    run: Path, *, steps: int, look: Callable[[SampledBatch, dict[str, Any]], None], weights_within: float = 1e-5
) -> None:
    """The run's losses, V, λ, step scale and final weights are those of the reference. ``look`` sees every batch."""
    config = load_config(run / "config.yaml", [])
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    model.eval()
    reference = make_reference(config, model)
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(recorded) == steps
    with StoreReader(run / "replay") as store:
        for step, metrics in enumerate(recorded):
            batch = store.batch(step)
            look(batch, metrics)
            expected = reference.step(batch)
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
            torch.testing.assert_close(
                trained[name], tensor, atol=weights_within, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
            moved = max(moved, float((tensor - base[name]).abs().max()))
    assert moved > 10 * weights_within, "the steps must move the weights by far more than the tolerance"


def make_reference(config: RunConfig, model: torch.nn.Module) -> ReferenceTrainer:
    """The reference with the settings of a run."""
    return ReferenceTrainer(
        model,
        algorithm=config.algorithm,
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
