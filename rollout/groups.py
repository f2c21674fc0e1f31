"""The one home of the conversion from completions and verdicts to a trajectory group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from r2vpo.records import NO_VERSION, Lease, Outcome, Trajectory, TrajectoryGroup
from rollout.generation import Completion
from rollout.rewards import Verdict
from rollout.tasks.base import TaskPrompt


def scored_group(
    lease: Lease,
    prompt: TaskPrompt,
    prompt_token_ids: Sequence[int],
    completions: Sequence[Completion],
    verdicts: Sequence[Verdict],
    *,
    worker: str,
) -> TrajectoryGroup:
    """Join every completion with its verdict.

    Prompt ``[5, 6]`` and response ``[7]`` sampled under version 3 with log-prob -0.5 become ``token_ids [5, 6, 7]``,
    ``loss_mask [F, F, T]``, ``behavior_logprob [0, 0, -0.5]``, ``version [-1, -1, 3]``.
    """
    trajectories = [
        _trajectory(prompt_token_ids, c, _outcome(c, v), v.reward) for c, v in zip(completions, verdicts, strict=True)
    ]
    return _group(lease, prompt, trajectories, worker=worker)


def sound_verdicts(completions: Sequence[Completion], verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, but an error for a completion with a log-prob that is not finite: nothing can be trained on it."""
    broken = Verdict(outcome=Outcome.ERROR, error="the engine reported a log-prob that is not a finite number")
    return [v if c.is_finite else broken for c, v in zip(completions, verdicts, strict=True)]


def failed_group(
    lease: Lease,
    prompt: TaskPrompt,
    prompt_token_ids: Sequence[int],
    *,
    size: int,
    worker: str,
    error: Exception,
) -> TrajectoryGroup:
    """A group of errors without token or reward, for a prompt that the engine refuses; the reason is its response."""
    nothing = Completion(
        text=str(error),
        token_ids_T=np.empty(0, dtype=np.int32),
        logprob_T=np.empty(0, dtype=np.float32),
        version_T=np.empty(0, dtype=np.int32),
        truncated=False,
    )
    trajectory = _trajectory(prompt_token_ids, nothing, Outcome.ERROR, None)
    return _group(lease, prompt, [trajectory] * size, worker=worker)


def _group(lease: Lease, prompt: TaskPrompt, trajectories: Sequence[Trajectory], *, worker: str) -> TrajectoryGroup:
    return TrajectoryGroup(
        key=lease.key,
        prompt=prompt.text,
        truth=prompt.truth,
        trajectories=tuple(trajectories),
        worker=worker,
        lease_version=lease.version,
    )


def _outcome(completion: Completion, verdict: Verdict) -> Outcome:
    """A cut response that was judged is ``truncated``; one that could not be judged keeps the verdict's outcome."""
    return Outcome.TRUNCATED if completion.truncated and verdict.outcome.has_reward else verdict.outcome


def _trajectory(
    prompt_token_ids: Sequence[int], completion: Completion, outcome: Outcome, reward: float | None
) -> Trajectory:
    num_prompt, num_response = len(prompt_token_ids), len(completion.token_ids_T)
    return Trajectory(
        token_ids_T=np.concatenate([np.asarray(prompt_token_ids, dtype=np.int32), completion.token_ids_T]),
        loss_mask_T=np.arange(num_prompt + num_response) >= num_prompt,
        behavior_logprob_T=np.concatenate([np.zeros(num_prompt, dtype=np.float32), completion.logprob_T]),
        version_T=np.concatenate([np.full(num_prompt, NO_VERSION, dtype=np.int32), completion.version_T]),
        outcome=outcome,
        reward=reward,
        response=completion.text,
    )
