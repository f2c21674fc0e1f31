"""What a learner step is made of, from prompts to micro-batches, and how old its tokens may be. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from learner.packing import deal_to_ranks
from r2vpo.job.config import RunConfig

TOKEN_BYTES = 13
"""Per token in the store: id and version (int32), log-prob (float32), mask (1 byte); see `replay.serialize`."""
TEXT_BYTES = 4
"""Per token of a response's text, about."""
GROUP_BYTES = 1300
"""Per group besides: about 900 of the payload's header and 400 of tables and indices, measured on the quickstart."""
USE_BYTES = 160
"""Per group and learner step in the consumption log, measured there too."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One full learner step, with every trajectory as long as the engine's window: an upper bound."""

    fresh: int
    """New groups that it takes (F)."""
    stale: int
    """Groups that it trains again."""
    trajectories: int
    tokens: int
    """Tokens of all trajectories, prompts included."""
    minibatches: int
    """Optimiser steps of one pass."""
    passes: int
    """Passes, unless the budget ends the learner step sooner."""
    minibatch_groups: int
    """Groups of the largest minibatch."""
    micro_batches: int
    """Forward and backward passes of one rank per optimiser step."""
    row_tokens: int
    """Tokens of the longest forward pass."""


@dataclass(frozen=True, kw_only=True)
class Lag:
    """How old a token may be when it is trained, and how much work may be under way."""

    fresh: int
    """Learner steps."""
    stale: int | None
    """Learner steps; None where nothing is trained again."""
    outstanding: int
    """Most groups that wait or are in flight: ``F · (max_lag + 1)``."""
    slots: int
    """Groups that all workers together generate at the same time."""


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What the store takes on disk, with every response as long as allowed: an upper bound."""

    group_bytes: int
    step_bytes: int
    run_bytes: int
    """After all steps, if nothing is evicted."""
    hour_bytes: float
    step_s: float
    """Seconds of a learner step that ``hour_bytes`` assumes."""


def batch(config: RunConfig) -> Batch:
    """A full batch of ``config``, laid out as the learner lays it out."""
    learner, rollout = config.learner, config.rollout
    groups = config.num_fresh + config.num_stale
    minibatch_groups = ceil(groups / learner.minibatches)
    longest = rollout.max_model_len
    per_rank = deal_to_ranks(
        [longest] * (minibatch_groups * rollout.group_size), ranks=learner.ranks, capacity=learner.micro_batch_tokens
    )
    return Batch(
        fresh=config.num_fresh,
        stale=config.num_stale,
        trajectories=groups * rollout.group_size,
        tokens=groups * rollout.group_size * longest,
        minibatches=learner.minibatches,
        passes=learner.passes,
        minibatch_groups=minibatch_groups,
        micro_batches=len(per_rank[0]),
        row_tokens=longest * max(len(members) for bins in per_rank for members in bins),
    )


def lag(config: RunConfig) -> Lag:
    """The bounds that the store keeps; see docs/lag.md."""
    again = config.num_stale > 0
    return Lag(
        fresh=max(config.replay.max_lag, config.replay.max_replay_lag if config.replay.sample == "window" else 0),
        stale=config.replay.max_replay_lag if again else None,
        outstanding=config.num_fresh * (config.replay.max_lag + 1),
        slots=config.rollout.workers * config.rollout.groups_in_flight,
    )


def growth(config: RunConfig, *, step_s: float) -> Growth:
    """Growth of the store at one learner step every ``step_s`` seconds."""
    rollout = config.rollout
    trajectory = TOKEN_BYTES * rollout.max_model_len + TEXT_BYTES * rollout.max_tokens
    group_bytes = rollout.group_size * trajectory + GROUP_BYTES
    step_bytes = config.num_fresh * group_bytes + (config.num_fresh + config.num_stale) * USE_BYTES
    return Growth(
        group_bytes=group_bytes,
        step_bytes=step_bytes,
        run_bytes=config.learner.steps * step_bytes,
        hour_bytes=3600 / step_s * step_bytes,
        step_s=step_s,
    )
