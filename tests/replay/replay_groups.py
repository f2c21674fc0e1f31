"""Groups for the tests of the replay store."""

from __future__ import annotations

import numpy as np

from r2vpo.records import NO_VERSION, Outcome, Trajectory, TrajectoryGroup, prompt_key


def make_trajectory(reward=1.0, *, version=0, outcome=None, num_prompt=2, num_response=3, response="42"):
    """Prompt tokens 0, 1, ... then response tokens sampled at ``version`` (an int, or one per response token)."""
    mask = np.array([False] * num_prompt + [True] * num_response)
    version_T = np.full(len(mask), NO_VERSION, dtype=np.int32)
    version_T[mask] = version
    return Trajectory(
        token_ids_T=np.arange(len(mask), dtype=np.int32),
        loss_mask_T=mask,
        behavior_logprob_T=np.where(mask, np.float32(-0.5), np.float32(0)),
        version_T=version_T,
        outcome=outcome or (Outcome.SCORED if reward is not None else Outcome.NO_VERDICT),
        reward=reward,
        response=response,
    )


def make_group(key=0, *, version=0, newest=None, rewards=(0.0, 1.0), worker="r0", lease_version=None):
    """A group whose tokens range from ``version`` to ``newest``; an int as key is an index of epoch 0."""
    newest = version if newest is None else newest
    return TrajectoryGroup(
        key=prompt_key(0, key) if isinstance(key, int) else key,
        prompt="6*7=",
        truth="42",
        trajectories=tuple(make_trajectory(r, version=[version, version, newest]) for r in rewards),
        worker=worker,
        lease_version=version if lease_version is None else lease_version,
    )


def unscored_group(key=0, *, version=0):
    """A group of which nothing can be learned: only one member has a verdict."""
    return make_group(key, version=version, rewards=(1.0, None))


def same(a: TrajectoryGroup, b: TrajectoryGroup) -> bool:
    """Equal bit for bit, types included."""

    def content(group):
        return (
            (group.key, group.prompt, group.truth, group.worker, group.lease_version),
            [
                (
                    [(x.dtype, x.shape, x.tobytes()) for x in arrays(t)],
                    t.outcome,
                    t.response,
                    None if t.reward is None else np.float64(t.reward).tobytes(),
                )
                for t in group.trajectories
            ],
        )

    def arrays(t):
        return t.token_ids_T, t.loss_mask_T, t.behavior_logprob_T, t.version_T

    return content(a) == content(b)
