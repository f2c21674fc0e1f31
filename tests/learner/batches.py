"""Batches for the tests of the learner: a tiny random model, and groups whose behaviour log-probs come from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from r2vpo.records import NO_VERSION, Kind, Outcome, SampledBatch, SampledGroup, Trajectory, TrajectoryGroup
from tests.tiny_models import VOCABULARY, log_probs, make_model


def trajectory(response, *, prompt=(1, 2), reward: float | None = 0.0, version: int | Sequence[int] = 0, logprob=-1.0):
    """A trajectory whose response trains; ``version`` and ``logprob`` are a number or one per response token."""
    mask_T = np.array([False] * len(prompt) + [True] * len(response))
    version_T, logprob_T = np.full(len(mask_T), NO_VERSION, np.int32), np.zeros(len(mask_T), np.float32)
    version_T[mask_T], logprob_T[mask_T] = version, logprob
    return Trajectory(
        token_ids_T=np.array([*prompt, *response], np.int32),
        loss_mask_T=mask_T,
        behavior_logprob_T=logprob_T,
        version_T=version_T,
        outcome=Outcome.NO_VERDICT if reward is None else Outcome.SCORED,
        reward=reward,
    )


def batch(
    groups: Sequence[Sequence[Trajectory]],
    *,
    step: int = 0,
    stale: Sequence[int] = (),
    weights: Mapping[int, float] | None = None,
) -> SampledBatch:
    """A batch of groups; ``stale`` holds the indices of the stale ones, ``weights`` those of draws other than 1."""
    sampled = [
        SampledGroup(
            group_id=i,
            kind=Kind.STALE if i in stale else Kind.FRESH,
            uses=int(i in stale),
            weight=(weights or {}).get(i, 1.0),
            group=TrajectoryGroup(key=f"0.{i}", prompt="", truth=None, trajectories=tuple(members)),
        )
        for i, members in enumerate(groups)
    ]
    return SampledBatch(step=step, groups=tuple(sampled))


def sampled_batches(
    directory: Path,
    *,
    steps: int,
    groups: int = 6,
    group_size: int = 4,
    max_response: int = 8,
    missing: bool = True,
    weighted: bool = False,
) -> list[SampledBatch]:
    """Batches of consecutive steps from 0: from step 2 on, half of the groups are stale and responses span versions.

    Behaviour log-probs are those of the model in ``directory`` (made there if it is not) with some noise, so that
    ratios differ from 1 and stay moderate. One trajectory in eight has no verdict, if ``missing``. Draws of stale
    groups have weights between 1/4 and 4, if ``weighted``.
    """
    if not (directory / "config.json").exists():
        make_model(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    rng = np.random.default_rng(7)

    def member(step: int, prompt: list[int], is_stale: bool) -> Trajectory:
        response = rng.integers(0, VOCABULARY, rng.integers(1, max_response + 1)).tolist()
        noise = 0.1 * rng.standard_normal(len(response))
        versions = np.sort(rng.integers(max(0, step - 3), step + 1 - is_stale, len(response)))
        if not is_stale and rng.random() < 0.5:
            versions[:] = step
        return trajectory(
            response,
            prompt=prompt,
            reward=None if missing and rng.random() < 1 / 8 else float(rng.integers(0, 2)),
            version=versions,
            logprob=log_probs(model, prompt + response)[len(prompt) - 1 :].numpy() + noise,
        )

    batches = []
    for step in range(steps):
        stale = range(groups // 2, groups) if step >= 2 else ()
        rows = []
        for g in range(groups):
            prompt = rng.integers(0, VOCABULARY, rng.integers(1, 5)).tolist()
            rows.append([member(step, prompt, g in stale) for _ in range(group_size)])
        weights = {g: float(4 ** rng.uniform(-1, 1)) for g in stale} if weighted else None
        batches.append(batch(rows, step=step, stale=stale, weights=weights))
    return batches
