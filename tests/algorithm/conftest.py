"""Builders of small records for the tests of this room."""

from __future__ import annotations

import numpy as np
import pytest

from r2vpo.records import Kind, Outcome, SampledBatch, SampledGroup, Trajectory, TrajectoryGroup


def _trajectory(
    response,
    *,
    prompt=(0,),
    logprob=-1.0,
    version=0,
    reward=0.0,
    outcome=None,
):
    """A trajectory whose response trains; ``logprob`` and ``version`` are a number or one per response token."""
    length, num_prompt = len(prompt) + len(response), len(prompt)
    if outcome is None:
        outcome = Outcome.NO_VERDICT if reward is None else Outcome.SCORED
    mask_T = np.arange(length) >= num_prompt
    logprob_T, version_T = np.zeros(length, np.float32), np.full(length, -1, np.int32)
    logprob_T[mask_T], version_T[mask_T] = logprob, version
    return Trajectory(
        token_ids_T=np.array([*prompt, *response], np.int32),
        loss_mask_T=mask_T,
        behavior_logprob_T=logprob_T,
        version_T=version_T,
        outcome=outcome,
        reward=reward,
    )


def _batch(groups, *, step=0, stale=(), weights=None):
    """A batch of groups (lists of trajectories); ``stale`` holds the indices of the stale ones, ``weights`` the
    importance weights of the draws by index.
    """
    return SampledBatch(
        step=step,
        groups=tuple(
            SampledGroup(
                group_id=i,
                kind=Kind.STALE if i in stale else Kind.FRESH,
                uses=int(i in stale),
                weight=(weights or {}).get(i, 1.0),
                group=TrajectoryGroup(key=f"0.{i}", prompt="", truth=None, trajectories=tuple(trajectories)),
            )
            for i, trajectories in enumerate(groups)
        ),
    )


@pytest.fixture
def make_trajectory():
    return _trajectory


@pytest.fixture
def make_batch():
    return _batch
