"""From the groups of a learner step to the tensors of its forward passes: the one home of this conversion.

    SampledBatch ──collate──▶ TrainingBatch ──pack──▶ MicroBatch (one row of concatenated trajectories, no padding)

Legend: ``_T`` tokens of a packed row, ``_N`` its trained tokens. Two trajectories "a b | c" and "d | e" (prompt |
response) become

    token_ids_T      a b c d e
    position_ids_T   0 1 2 0 1      restart at 0: attention stays inside a trajectory
    index_N          1 3            the positions whose logits predict c and e
    target_N         c e

See docs/loss.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.packing import Bins, deal_to_ranks, level
from r2vpo.algorithm.advantages import batch_advantages
from r2vpo.algorithm.budget import GroupSignal, budget_share
from r2vpo.algorithm.minibatches import split_minibatches
from r2vpo.algorithm.objectives import needs_proximal
from r2vpo.algorithm.tokens import TokenBatch
from r2vpo.records import Kind, SampledBatch, Trajectory


class LagViolation(RuntimeError):  # noqa: N818 - says what happened
    """A batch holds a token outside the configured bound of its kind. The run must stop: its data is not what it says.

    The bounds are kept where data is handed out; this is the check at consumption.
    """


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A trajectory that trains: it has a verdict and at least one sampled token."""

    trajectory: Trajectory
    kind: Kind
    advantage: float
    draw_weight: float
    """Importance weight of its group's draw."""
    lag_N: np.ndarray
    """int64 ``[N]``: learner version minus the version of each trained token."""
    proximal: bool
    """Whether its ``logp_prox`` must be computed; otherwise the behaviour log-probs are the proximal ones."""


@dataclass(frozen=True, kw_only=True)
class TrainingBatch:
    """A learner step, laid out for all ranks. Every rank computes the same one."""

    samples: tuple[Sample, ...]
    minibatches: tuple[tuple[int, ...], ...]
    """Indices into ``samples``, one entry per optimiser step; an entry may be empty."""
    train: tuple[list[Bins], ...]
    """``[minibatch][rank][micro-batch]``: indices into ``samples``."""
    proximal: list[Bins]
    """``[rank][micro-batch]``: the samples of each rank whose ``logp_prox`` must be computed."""
    budget_share: float
    """Share of δ that the batch may spend; see `r2vpo.algorithm.budget.budget_share`."""

    def num_tokens(self, minibatch: int) -> int:
        """Trained tokens of a minibatch over all ranks."""
        return sum(len(self.samples[i].lag_N) for i in self.minibatches[minibatch])

    def num_trajectories(self, minibatch: int) -> int:
        """Trajectories that train in a minibatch, over all ranks."""
        return len(self.minibatches[minibatch])


def collate(
    batch: SampledBatch,
    *,
    advantage: str,
    minibatches: int,
    seed: int,
    exact_engine: bool,
    ranks: int,
    micro_batch_tokens: int,
) -> TrainingBatch:
    """Lay out ``batch``. Trajectories without a verdict or without a sampled token are left out entirely.

    ``advantage`` is the mode of `batch_advantages`; ``exact_engine`` says that the behaviour log-probs of the current
    version are those of the learner to rounding, so that only trajectories with a stale token need ``logp_prox``.
    """
    rewards = [sampled.group.rewards_G for sampled in batch.groups]
    advantages = batch_advantages(rewards, mode=advantage)
    samples: list[Sample] = []
    members: list[tuple[int, ...]] = []
    known: list[GroupSignal] = []
    for groups in split_minibatches(batch, minibatches=minibatches, seed=seed):
        first = len(samples)
        for g in groups:
            of_group = _samples(batch, g, advantages[g], exact_engine=exact_engine)
            samples += of_group
            if of_group:
                has_signal = any(s.advantage != 0 for s in of_group)
                known.append(GroupSignal(batch.groups[g].kind == Kind.FRESH, has_signal, float(np.nanmean(rewards[g]))))
        members.append(tuple(range(first, len(samples))))
    train = tuple(_deal(samples, indices, ranks, micro_batch_tokens) for indices in members)
    return TrainingBatch(
        samples=tuple(samples),
        minibatches=tuple(members),
        train=train,
        proximal=_deal_proximal(samples, train, ranks, micro_batch_tokens),
        budget_share=budget_share(known),
    )


def check_lags(batch: SampledBatch, *, max_lag: int, max_replay_lag: int) -> None:
    """Raise `LagViolation` if a sampled token's lag is negative or above the bound of its group's kind."""
    bounds = {Kind.FRESH: ("replay.max_lag", max_lag), Kind.STALE: ("replay.max_replay_lag", max_replay_lag)}
    for sampled in batch.groups:
        key, bound = bounds[sampled.kind]
        oldest, newest = sampled.group.oldest_version, sampled.group.newest_version
        name = f"step {batch.step} was given the {sampled.kind} group {sampled.group_id} (prompt {sampled.group.key})"
        if batch.step - oldest > bound:
            raise LagViolation(
                f"{name} with a token of version {oldest}, a lag of {batch.step - oldest} > {key}={bound}"
            )
        if newest > batch.step:
            raise LagViolation(f"{name} with a token of version {newest}: its weights do not exist yet")


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """The input of one forward pass, and which of its outputs are wanted. An empty pass has one token and N = 0."""

    token_ids_T: Tensor
    """int64 ``[T]``."""
    position_ids_T: Tensor
    """int64 ``[T]``: restarts at 0 with every trajectory."""
    index_N: Tensor
    """int64 ``[N]``: positions in the row whose logits predict a trained token."""
    target_N: Tensor
    """int64 ``[N]``: the trained tokens."""

    def to(self, device: torch.device) -> PackedRow:
        """The same row on ``device``."""
        return PackedRow(**{name: tensor.to(device) for name, tensor in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """A packed row with all that its loss needs besides the log-probs, complete at birth."""

    row: PackedRow
    behavior_logp_N: Tensor
    """float32 ``[N]``."""
    logp_prox_N: Tensor
    """float32 ``[N]``."""
    advantage_N: Tensor
    """float32 ``[N]``."""
    draw_weight_N: Tensor
    """float32 ``[N]``."""
    sequence_N: Tensor
    """int64 ``[N]``: index of the token's trajectory in the row; a row holds whole trajectories."""
    lag_N: Tensor
    """int64 ``[N]``."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch on ``device``."""
        return MicroBatch(**{name: part.to(device) for name, part in vars(self).items()})

    def tokens(self, logp_N: Tensor) -> TokenBatch:
        """The arguments of the objective, given the log-probs ``[N]`` under the weights being trained."""
        return TokenBatch(
            logp_N=logp_N,
            logp_prox_N=self.logp_prox_N,
            behavior_logp_N=self.behavior_logp_N,
            advantage_N=self.advantage_N,
            draw_weight_N=self.draw_weight_N,
            sequence_N=self.sequence_N,
        )


def pack_row(trajectories: Sequence[Trajectory]) -> PackedRow:
    """Concatenate trajectories into one row; none at all gives a row of one token that trains nothing."""
    if not trajectories:
        none = torch.zeros(0, dtype=torch.int64)
        one = torch.zeros(1, dtype=torch.int64)
        return PackedRow(token_ids_T=one, position_ids_T=one, index_N=none, target_N=none)
    token_ids_T = np.concatenate([t.token_ids_T for t in trajectories])
    trained_N = np.flatnonzero(np.concatenate([t.loss_mask_T for t in trajectories]))
    return PackedRow(
        token_ids_T=_int64(token_ids_T),
        position_ids_T=_int64(np.concatenate([np.arange(t.num_tokens) for t in trajectories])),
        index_N=_int64(trained_N - 1),
        target_N=_int64(token_ids_T[trained_N]),
    )


def pack(samples: Sequence[Sample], logp_prox: Sequence[np.ndarray | None]) -> MicroBatch:
    """Pack samples with their proximal log-probs ``[N]``; None where the behaviour log-probs are the proximal ones."""
    behavior = [s.trajectory.behavior_logprob_T[s.trajectory.loss_mask_T] for s in samples]
    proximal = [b if p is None else p for b, p in zip(behavior, logp_prox, strict=True)]
    return MicroBatch(
        row=pack_row([s.trajectory for s in samples]),
        behavior_logp_N=_float32(behavior),
        logp_prox_N=_float32(proximal),
        advantage_N=_float32([np.full(len(s.lag_N), s.advantage) for s in samples]),
        draw_weight_N=_float32([np.full(len(s.lag_N), s.draw_weight) for s in samples]),
        sequence_N=_int64(np.repeat(np.arange(len(samples)), [len(s.lag_N) for s in samples])),
        lag_N=_int64(np.concatenate([np.zeros(0, np.int64), *(s.lag_N for s in samples)])),
    )


def unpack(samples: Sequence[Sample], values_N: np.ndarray) -> list[np.ndarray]:
    """Split the values of a packed row's trained tokens into those of its samples."""
    ends = np.cumsum([len(s.lag_N) for s in samples])
    assert ends[-1] == len(values_N), f"{len(values_N)} values for {ends[-1]} trained tokens"
    return np.split(values_N, ends[:-1])


def _samples(batch: SampledBatch, index: int, advantage_G: np.ndarray, *, exact_engine: bool) -> list[Sample]:
    sampled = batch.groups[index]
    samples = []
    for t, a in zip(sampled.group.trajectories, advantage_G, strict=True):
        if not t.outcome.has_reward or t.num_trained_tokens == 0:
            continue
        if t.loss_mask_T[0]:
            raise ValueError(
                f"group {sampled.group_id} (prompt {sampled.group.key}) trains its first token, which no token before "
                "it could predict; prompts need at least one token"
            )
        lag_N = batch.step - t.version_T[t.loss_mask_T].astype(np.int64)
        proximal = not exact_engine or needs_proximal(t, batch.step)
        samples.append(
            Sample(
                trajectory=t,
                kind=sampled.kind,
                advantage=float(a),
                draw_weight=sampled.weight,
                lag_N=lag_N,
                proximal=proximal,
            )
        )
    return samples


def _deal(samples: Sequence[Sample], indices: Sequence[int], ranks: int, capacity: int) -> list[Bins]:
    """Micro-batches ``[rank][i]`` of the samples ``indices``, as indices into ``samples``."""
    sizes = [samples[i].trajectory.num_tokens for i in indices]
    per_rank = deal_to_ranks(sizes, ranks=ranks, capacity=capacity)
    return [[[indices[j] for j in members] for members in bins] for bins in per_rank]


def _deal_proximal(samples: Sequence[Sample], train: Sequence[Sequence[Bins]], ranks: int, capacity: int) -> list[Bins]:
    """Each rank computes ``logp_prox`` of what it will train itself, so that no log-prob has to travel."""
    per_rank: list[Bins] = []
    for rank in range(ranks):
        wanted = [i for minibatch in train for members in minibatch[rank] for i in members if samples[i].proximal]
        per_rank.append(_deal(samples, wanted, 1, capacity)[0] if wanted else [])
    return level(per_rank)


def _int64(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _float32(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0), *parts]).astype(np.float32))
