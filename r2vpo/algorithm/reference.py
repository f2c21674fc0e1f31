"""The synchronous reference trainer: one process, one trajectory per forward pass, no packing, no padding.

It exists to be obviously correct. The learner group must give the same steps on the same batches; a test compares them.

    batch ──batch_advantages──▶ samples ──logp_prox, once──▶ minibatches ──▶ loss, backward, clip, AdamW, λ ──▶ s
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2vpo.algorithm.advantages import batch_advantages
from r2vpo.algorithm.budget import Budget, GroupSignal, budget_share
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.m2po import m2po_mask
from r2vpo.algorithm.minibatches import split_minibatches
from r2vpo.algorithm.objectives import loss_denominator, needs_proximal, objective, second_moment_sum
from r2vpo.algorithm.step_control import warmup_factor
from r2vpo.algorithm.tokens import TokenBatch
from r2vpo.records import Kind, SampledBatch, Trajectory


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """A trajectory that trains, with all that is constant during the learner step."""

    trajectory: Trajectory
    advantage: float
    draw_weight: float
    logp_prox_N: Tensor

    def tokens(self, logp_N: Tensor, keep_N: Tensor | None) -> TokenBatch:
        return TokenBatch(
            logp_N=logp_N,
            logp_prox_N=self.logp_prox_N,
            behavior_logp_N=_behavior_logp(self.trajectory).to(logp_N),
            advantage_N=torch.full_like(logp_N, self.advantage),
            draw_weight_N=torch.full_like(logp_N, self.draw_weight),
            sequence_N=torch.zeros_like(logp_N, dtype=torch.long),
            keep_N=keep_N,
        )


class ReferenceTrainer:
    """Trains a causal language model, ``model(input_ids [1, T]).logits [1, T, vocabulary]``, in place.

    Every parameter that requires a gradient is trained and decayed alike. The model's mode is left alone:
    dropout must be off. A loss or gradient that is not finite raises ``RuntimeError``.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        algorithm: AlgorithmConfig,
        lr: float,
        warmup_steps: int,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        grad_clip: float,
        minibatches: int,
        temperature: float,
        seed: int,
        passes: int = 1,
    ) -> None:
        """``lr`` is nominal: warm-up over ``warmup_steps`` optimiser steps and the step control scale it.

        ``grad_clip`` is the largest gradient norm, ``temperature`` that of sampling, ``seed`` that of the split into
        minibatches, ``passes`` how often a learner step goes through its batch unless the budget ends it.
        """
        self.model = model
        self.budget = Budget(algorithm)
        self.num_optimizer_steps = 0
        self._algorithm = algorithm
        self._objective = objective(algorithm)
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self._lr, self._warmup_steps, self._grad_clip = lr, warmup_steps, grad_clip
        self._minibatches, self._temperature, self._seed, self._passes = minibatches, temperature, seed, passes

    def step(self, batch: SampledBatch) -> dict[str, Any]:
        """One learner step. A minibatch without trained tokens makes no optimiser step but is counted.

        Returns ``losses``, ``second_moments`` and ``grad_norm`` (before clipping), lists over the optimiser steps;
        ``loss`` and ``second_moment``, their means (NaN if there was none); ``lam`` and ``step_scale`` as the next step
        will use them; ``empty_minibatches``, a count.
        """
        rewards = [sampled.group.rewards_G for sampled in batch.groups]
        advantages = batch_advantages(rewards, mode=self._algorithm.advantage)
        groups = [self._samples(batch, i, advantages[i]) for i in range(len(batch.groups))]
        minibatches = [
            [sample for i in indices for sample in groups[i]]
            for indices in split_minibatches(batch, minibatches=self._minibatches, seed=self._seed)
        ]
        trained = [samples for samples in minibatches if samples]
        known = (
            GroupSignal(sampled.kind == Kind.FRESH, any(s.advantage != 0 for s in samples), float(np.nanmean(reward_G)))
            for sampled, samples, reward_G in zip(batch.groups, groups, rewards, strict=True)
            if samples
        )
        self.budget.begin(share=budget_share(known))
        losses, second_moments, grad_norms = [], [], []
        for samples in trained * self._passes:
            loss, second_moment, grad_norm = self._optimizer_step(samples)
            losses.append(loss)
            second_moments.append(second_moment)
            grad_norms.append(grad_norm)
            if not self.budget.observe(second_moment):
                break
        self.budget.end()
        return {
            "loss": _mean(losses),
            "losses": losses,
            "second_moment": _mean(second_moments),
            "second_moments": second_moments,
            "grad_norm": grad_norms,
            "lam": self.budget.lam,
            "step_scale": self.budget.scale,
            "empty_minibatches": len(minibatches) - len(trained),
        }

    def _samples(self, batch: SampledBatch, index: int, advantage_G: np.ndarray) -> list[_Sample]:
        """The trajectories of one group that train: those with a verdict and at least one sampled token."""
        sampled = batch.groups[index]
        return [
            _Sample(
                trajectory=t,
                advantage=float(a),
                draw_weight=sampled.weight,
                logp_prox_N=self._logp_prox(t, batch.step),
            )
            for t, a in zip(sampled.group.trajectories, advantage_G, strict=True)
            if t.outcome.has_reward and t.num_trained_tokens
        ]

    @torch.no_grad()
    def _logp_prox(self, trajectory: Trajectory, step: int) -> Tensor:
        return self._logp(trajectory) if needs_proximal(trajectory, step) else _behavior_logp(trajectory)

    def _logp(self, trajectory: Trajectory) -> Tensor:
        """Log-probs ``[N]`` of the trained tokens; logits at position t - 1 predict token t."""
        mask_T = torch.tensor(trajectory.loss_mask_T)
        assert not mask_T[0], "the first token of a trajectory has nothing before it that could predict it"
        token_ids_T = torch.tensor(trajectory.token_ids_T, dtype=torch.long)
        logits_TV = self.model(token_ids_T[None]).logits[0]
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        logp_TV = torch.log_softmax(logits_TV[:-1] / self._temperature, dim=-1)
        return logp_TV.gather(1, token_ids_T[1:, None])[:, 0][mask_T[1:]]

    def _optimizer_step(self, samples: Sequence[_Sample]) -> tuple[float, float, float]:
        """Loss, V and gradient norm of one minibatch, all measured before its parameters move."""
        num_tokens = sum(s.trajectory.num_trained_tokens for s in samples)
        denominator = loss_denominator(self._algorithm, num_tokens, len(samples))
        self._optimizer.zero_grad()
        loss, second_moment = 0.0, 0.0
        for sample, keep_N in zip(samples, self._kept(samples), strict=True):
            tokens = sample.tokens(self._logp(sample.trajectory), keep_N)
            part = self._objective(tokens, denominator, self.budget.lam)
            part.backward()
            loss += part.item()
            second_moment += second_moment_sum(tokens).item() / num_tokens
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._grad_clip, error_if_nonfinite=True)
        warmup = warmup_factor(self.num_optimizer_steps, self._warmup_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * warmup * self.budget.scale
        self._optimizer.step()
        self.num_optimizer_steps += 1
        return loss, second_moment, grad_norm.item()

    @torch.no_grad()
    def _kept(self, samples: Sequence[_Sample]) -> Sequence[Tensor | None]:
        """The mask of M2PO for each sample, from all tokens of the minibatch; None under every other objective."""
        if self._algorithm.name != "m2po":
            return [None] * len(samples)
        tokens = [sample.tokens(self._logp(sample.trajectory), None) for sample in samples]
        keep_N = m2po_mask(
            torch.cat([t.logp_N - t.behavior_logp_N for t in tokens]),
            torch.cat([t.advantage_N for t in tokens]),
            self._algorithm.m2_limit,
        )
        return keep_N.split([t.logp_N.numel() for t in tokens])


def _behavior_logp(trajectory: Trajectory) -> Tensor:
    """Behaviour log-probs ``[N]`` of the trained tokens."""
    return torch.from_numpy(trajectory.behavior_logprob_T[trajectory.loss_mask_T])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan
