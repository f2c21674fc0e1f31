"""One learner step on tensors: the steps of `r2vpo.algorithm.reference.ReferenceTrainer`, a minibatch in one pass.

    batch ──advantages──▶ logp_prox, once ──▶ minibatches, `passes` times ──▶ loss, backward, clip, AdamW, λ ──▶ s
                                                                     until the budget ends it

A test shows that the parameters after a step are those of the reference trainer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.evidence.model import Decoder
from benchmarks.evidence.pool import Groups
from benchmarks.evidence.setting import Setting
from r2vpo.algorithm.advantages import batch_advantages
from r2vpo.algorithm.budget import Budget, GroupSignal, budget_share
from r2vpo.algorithm.m2po import m2po_mask
from r2vpo.algorithm.minibatches import split_minibatches
from r2vpo.algorithm.objectives import loss_denominator, objective, second_moment_sum
from r2vpo.algorithm.step_control import warmup_factor
from r2vpo.algorithm.tokens import TokenBatch
from r2vpo.records import Kind, Outcome, SampledBatch, SampledGroup, Trajectory, TrajectoryGroup

BETAS = (0.9, 0.95)
GRAD_CLIP = 1.0
WARMUP_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one learner step did."""

    second_moments: list[float]
    """V of each optimiser step."""
    grad_norms: list[float]
    """Before clipping, of each optimiser step."""
    tokens: int
    """Tokens trained on, counted once per optimiser step."""
    lam: float
    step_scale: float


class Learner:
    """Trains a decoder in place."""

    def __init__(self, model: Decoder, setting: Setting) -> None:
        config = setting.algorithm_config()
        self.model = model
        self._setting, self._config, self._budget = setting, config, Budget(config)
        self._objective = objective(config)
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=setting.lr, betas=BETAS, weight_decay=0.0, fused=True)
        self.num_optimizer_steps = 0

    def step(self, batch: Groups, *, step: int) -> StepReport:
        """Learner step ``step`` on fresh groups (born in it) and stale ones."""
        advantage_Bn = self._advantages(batch)
        prox_BnT = self._logp_prox(batch, step)
        second_moments, grad_norms, num_tokens = [], [], 0
        signal_B = (advantage_Bn != 0).any(1)
        known = zip((batch.born_B == step).tolist(), signal_B.tolist(), batch.reward_Bn.mean(1).tolist(), strict=True)
        self._budget.begin(share=budget_share(GroupSignal(*of_group) for of_group in known))
        for rows in self._minibatches(batch, step) * self._setting.passes:
            second_moment, grad_norm = self._optimizer_step(batch.take(rows), advantage_Bn[rows], prox_BnT[rows])
            num_tokens += batch.answer_BnT[rows].numel()
            second_moments.append(second_moment)
            grad_norms.append(grad_norm)
            if not self._budget.observe(second_moment):
                break
        self._budget.end()
        return StepReport(
            second_moments=second_moments,
            grad_norms=grad_norms,
            tokens=num_tokens,
            lam=self._budget.lam,
            step_scale=self._budget.scale,
        )

    def _advantages(self, batch: Groups) -> Tensor:
        """``[B, n]``, in the type of the weights."""
        rows = batch_advantages(list(batch.reward_Bn.numpy()), mode=self._config.advantage)
        return torch.from_numpy(np.stack(rows)).to(self.model.norm.dtype)

    @torch.no_grad()
    def _logp_prox(self, batch: Groups, step: int) -> Tensor:
        """Log-probs under the current weights ``[B, n, T]``; those of sampling where these are the current weights."""
        prox_BnT = batch.behavior_logp_BnT.clone()
        old_B = batch.version_B < step
        if old_B.any():
            prox_BnT[old_B] = self.model.logp(batch.prompt_BP[old_B], batch.answer_BnT[old_B])
        return prox_BnT

    def _minibatches(self, batch: Groups, step: int) -> list[Tensor]:
        """Rows of each minibatch, dealt by the product's own rule."""
        groups = tuple(_FRESH if fresh else _STALE for fresh in (batch.born_B == step).tolist())
        dealt = split_minibatches(
            SampledBatch(step=step, groups=groups), minibatches=self._setting.minibatches, seed=self._setting.seed
        )
        return [torch.tensor(rows) for rows in dealt]

    def _optimizer_step(self, batch: Groups, advantage_Bn: Tensor, prox_BnT: Tensor) -> tuple[float, float]:
        """V and gradient norm of one minibatch, measured before its parameters move."""
        denominator = loss_denominator(self._config, batch.answer_BnT.numel(), batch.reward_Bn.numel())
        if self._setting.skip_no_signal:
            kept_B = batch.has_signal_B
            batch, advantage_Bn, prox_BnT = batch.take(kept_B), advantage_Bn[kept_B], prox_BnT[kept_B]
        tokens = token_batch(self.model.logp(batch.prompt_BP, batch.answer_BnT), batch, advantage_Bn, prox_BnT)
        if self._config.name == "m2po":
            tokens = replace(tokens, keep_N=self._kept(tokens))
        self._optimizer.zero_grad()
        self._objective(tokens, denominator, self._budget.lam).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self._parameters, GRAD_CLIP, error_if_nonfinite=True)
        warmup = warmup_factor(self.num_optimizer_steps, WARMUP_STEPS)
        for group in self._optimizer.param_groups:
            group["lr"] = self._setting.lr * warmup * self._budget.scale
        self._optimizer.step()
        self.num_optimizer_steps += 1
        return second_moment_sum(tokens).item() / max(tokens.logp_N.numel(), 1), grad_norm.item()

    def _kept(self, tokens: TokenBatch) -> Tensor:
        """The mask of M2PO, from all tokens of the minibatch."""
        log_ratio_N = tokens.logp_N.detach() - tokens.behavior_logp_N
        return m2po_mask(log_ratio_N, tokens.advantage_N, self._config.m2_limit)


def token_batch(logp_BnT: Tensor, batch: Groups, advantage_Bn: Tensor, prox_BnT: Tensor) -> TokenBatch:
    """What the objective sees of a minibatch: its tokens flat, N = B·n·T."""
    batch_size, members, answer_tokens = logp_BnT.shape
    return TokenBatch(
        logp_N=logp_BnT.flatten(),
        logp_prox_N=prox_BnT.flatten(),
        behavior_logp_N=batch.behavior_logp_BnT.flatten(),
        advantage_N=advantage_Bn[..., None].expand_as(logp_BnT).flatten(),
        draw_weight_N=batch.draw_weight_B[:, None, None].expand_as(logp_BnT).flatten(),
        sequence_N=torch.arange(batch_size * members).repeat_interleave(answer_tokens),
    )


def _placeholder(kind: Kind) -> SampledGroup:
    """A group of which only the kind is read: that is all the rule of the minibatches looks at."""
    empty = torch.empty(0).numpy()
    trajectory = Trajectory(
        token_ids_T=empty,
        loss_mask_T=empty,
        behavior_logprob_T=empty,
        version_T=empty,
        outcome=Outcome.NO_VERDICT,
        reward=None,
    )
    group = TrajectoryGroup(key="0.0", prompt="", truth=None, trajectories=(trajectory,))
    return SampledGroup(group_id=0, kind=kind, uses=0, group=group)


_FRESH, _STALE = _placeholder(Kind.FRESH), _placeholder(Kind.STALE)
