"""A learner that dies costs no number: a synchronous run, killed and resumed, ends with the very same parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.victims import Run

pytestmark = [pytest.mark.engine, pytest.mark.faults, pytest.mark.slow]
STEPS = 8
SYNCHRONOUS = (
    "task.eval_prompts=16",
    "rollout.groups_in_flight=1",
    "replay.max_lag=0",
    "replay.stale_fraction=0",
    "learner.groups_per_step=8",
    "learner.minibatches=2",
    f"learner.steps={STEPS}",
    "learner.checkpoint_every=1",
    "supervisor.backoff_s=0.5",
)


def parameters(run: Run) -> dict[str, torch.Tensor]:
    code, output = run.end()
    assert code == 0, output
    assert run.steps() == list(range(STEPS))
    assert run.audit().violations == ()
    return load_file(run.folder / "model" / "model.safetensors")


def differing(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    assert left.keys() == right.keys()
    return [name for name, tensor in left.items() if not torch.equal(tensor, right[name])]


def test_with_a_checkpoint_at_every_step_a_killed_learner_or_driver_changes_no_bit_of_the_model(tmp_path: Path):
    undisturbed = parameters(Run(tmp_path / "undisturbed", *SYNCHRONOUS))
    run = Run(tmp_path / "learner", *SYNCHRONOUS)
    run.await_steps(4)
    run.kill("ray::LearnerRank")
    run.await_output(r"note: the learner group is back at step \d+ after")
    assert differing(parameters(run), undisturbed) == []
    killed = Run(tmp_path / "driver", *SYNCHRONOUS)
    killed.await_steps(4)
    killed.kill("driver")
    killed.end()
    assert differing(parameters(Run(tmp_path / "driver", *SYNCHRONOUS, "--resume")), undisturbed) == []
