"""What a learner step was fed: figures of the batch itself, the same on every rank without asking the others."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from learner.collate import TrainingBatch
from r2vpo.records import Kind, SampledBatch


def batch_metrics(batch: SampledBatch, layout: TrainingBatch) -> dict[str, float]:
    """Metrics ``train/…``.

    ``tokens, trajectories``: those trained. ``stale_tokens``: of these, in stale groups. ``proximal_tokens``: those
    whose logp_prox was computed. ``without_verdict``: trajectories left out. ``zero_signal_fraction``: groups whose
    advantages are all 0. ``lag_mean, lag_max``: over trained tokens (learner steps). ``reward_mean, reward_min,
    reward_max``: over the verdicts of fresh groups. The last two kinds are absent where there is nothing to average.
    """
    samples = layout.samples
    fresh = [g.group for g in batch.groups if g.kind == Kind.FRESH]
    metrics = {
        "train/tokens": _tokens(s.lag_N for s in samples),
        "train/trajectories": float(len(samples)),
        "train/stale_tokens": _tokens(s.lag_N for s in samples if s.kind == Kind.STALE),
        "train/proximal_tokens": _tokens(s.lag_N for s in samples if s.proximal),
        "train/groups": float(len(batch.groups)),
        "train/stale_groups": float(len(batch.groups) - len(fresh)),
        "train/without_verdict": float(
            sum(t.reward is None for sampled in batch.groups for t in sampled.group.trajectories)
        ),
        "train/zero_signal_fraction": float(np.mean([not g.group.has_signal for g in batch.groups])),
    }
    if samples:
        lag_N = np.concatenate([s.lag_N for s in samples])
        metrics |= {"train/lag_mean": float(lag_N.mean()), "train/lag_max": float(lag_N.max())}
    verdicts = [t.reward for group in fresh for t in group.trajectories if t.reward is not None]
    if verdicts:
        metrics |= {
            "train/reward_mean": float(np.mean(verdicts)),
            "train/reward_min": float(min(verdicts)),
            "train/reward_max": float(max(verdicts)),
        }
    return metrics


def _tokens(lags: Iterable[np.ndarray]) -> float:
    return float(sum(len(lag_N) for lag_N in lags))
