"""The real vLLM engine: new weights arrive exactly, in every architecture, while requests are in flight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import CLASSES

pytestmark = pytest.mark.engine


def measure(directory: Path, scenario: str) -> dict:
    """Run a scenario of this file in a process of its own: an engine wants its environment before vLLM is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.rollout.engine_scenarios", scenario, str(directory)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", CLASSES)
def test_engine_equals_the_trainer_after_every_update(kind: str, tied: bool, tmp_path: Path):
    gaps = measure(tmp_path, f"parity {kind} {tied}")
    assert len(gaps["gaps"]) == 3
    assert max(gaps["gaps"]) < 1e-4
    assert gaps["moved"] > 0.5, "the update must be large enough that stale weights would show"


def test_a_response_sampled_across_updates_names_every_version_and_its_log_probs(tmp_path: Path):
    result = measure(tmp_path, "spans")
    versions = result["versions"]
    assert len(versions) == result["tokens"]
    assert versions == sorted(versions)
    assert len(set(versions)) >= 3
    # Caches do not outlive a version: each token's log-prob is that of the version it names, given the whole prefix.
    assert result["gap"] < 1e-4


def test_members_are_reproducible_and_differ_and_prompts_do_not_share_their_noise(tmp_path: Path):
    result = measure(tmp_path, "seeds")
    assert result["first"] == result["again"]
    assert len({tuple(r) for r in result["first"]}) == len(result["first"])
    assert not {tuple(r) for r in result["first"]} & {tuple(r) for r in result["other"]}


def test_the_behaviour_log_prob_is_that_of_the_tempered_distribution(tmp_path: Path):
    result = measure(tmp_path, "temperature")
    assert result["gap"] < 1e-4


def test_a_crowd_survives_an_update_and_a_prompt_that_does_not_fit_is_a_value_error(tmp_path: Path):
    result = measure(tmp_path, "crowd")
    assert result["lengths"] == [100]
    assert result["crossed"] > 12, "64 sequences of 160 tokens and more are over the 2048 that are computed at once"
    assert "512" in result["refused"]
    assert result["alive"] == 1
