"""One rank of the learner group: a batch of groups in, new weights and metrics out. No Ray here.

    SampledBatch ──check lags──▶ TrainingBatch ──logp_prox, once──▶ for each minibatch:
        micro-batches: forward, objective, backward ──▶ V over all ranks ──▶ optimiser step ──▶ λ
    ──▶ step size s, metrics, version + 1

All ranks call every public method with the same arguments. What they decide (the layout, λ, s, whether a step is
discarded) is the same everywhere, because it is computed from the batch itself or from sums over all ranks. The
arithmetic is that of `r2vpo.algorithm.reference.ReferenceTrainer`, and a test compares the two.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from math import nan
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from learner import checkpoint
from learner.collate import MicroBatch, PackedRow, TrainingBatch, check_lags, collate, pack, pack_row, unpack
from learner.config import LearnerConfig
from learner.engine import LearnerEngine
from learner.errors import WeightsNotFinite
from learner.export import export_model
from learner.finite import CAUSES, count_not_finite, first_cause
from learner.logprobs import token_logprobs
from learner.metrics import batch_metrics
from learner.publish import BucketEncoder, bucket_names, canary_tokens
from r2vpo.algorithm.budget import Budget
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.diagnostics import LagDiagnostics
from r2vpo.algorithm.minibatches import split_minibatches
from r2vpo.algorithm.objectives import loss_denominator, objective, second_moment_sum
from r2vpo.algorithm.step_control import warmup_factor
from r2vpo.records import Buckets, Canary, SampledBatch, WeightManifest

Payload = TypeVar("Payload")
logger = logging.getLogger(__name__)


class OptimizerStep(NamedTuple):
    """What one minibatch showed, measured before its weights moved; the same on all ranks."""

    loss: float
    second_moment: float
    """V over the trained tokens of all ranks, importance weights of the draws included."""
    entropy: float
    """Mean entropy (nats) of the distributions that the trained tokens were drawn from."""
    grad_norm: float
    lr: float
    cause: str
    """What was not finite, so that nothing moved; empty if the step was applied."""

    @property
    def applied(self) -> bool:
        """Whether the weights moved."""
        return not self.cause


class LearnerTrainer:
    """Trains the model of ``model_path``. The process group must exist (`learner.engine.init_distributed`)."""

    def __init__(
        self,
        config: LearnerConfig,
        algorithm: AlgorithmConfig,
        *,
        model_path: str,
        temperature: float,
        max_lag: int,
        max_replay_lag: int,
        exact_engine: bool,
        seed: int,
        canary_text: str = "",
    ) -> None:
        """``temperature`` is that of sampling; ``max_lag`` and ``max_replay_lag`` bound fresh and stale tokens.

        ``exact_engine`` says that the rollout engine computes in the learner's type, so that behaviour log-probs of the
        current version serve as proximal ones; ``seed`` is that of the split into minibatches;
        ``canary_text`` a prompt of the task, by which engines prove that they hold the right weights.
        """
        assert algorithm.name != "m2po", "its mask needs a whole minibatch in one pass; RunConfig refuses it"
        self.engine = LearnerEngine(config, model_path=model_path)
        self.budget = Budget(algorithm)
        self.version = 0
        """The next learner step, and the version of the weights."""
        self.num_optimizer_steps = 0
        self._config, self._algorithm, self._model_path = config, algorithm, model_path
        self._objective = objective(algorithm)
        self._temperature, self._seed, self._exact_engine = temperature, seed, exact_engine
        self._max_lag, self._max_replay_lag = max_lag, max_replay_lag
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False)
        prompt = tokenizer(canary_text)["input_ids"] if canary_text else []
        self._canary_tokens = canary_tokens(
            prompt, vocab_size=self.engine.vocab_size, special_ids=self.engine.special_ids
        )

    def step(self, batch: SampledBatch) -> dict[str, float]:
        """One learner step; returns its metrics, flat and namespaced (see `learner.metrics` for those of the batch).

        ``step/…`` and ``dual/…`` are means over the optimiser steps that were applied, and absent if there were none.
        `LagViolation` if a token is outside its bound, ``ValueError`` if the batch is not that of the next step.
        """
        if batch.step != self.version:
            raise ValueError(f"the batch of step {batch.step} was given to a learner whose next step is {self.version}")
        check_lags(batch, max_lag=self._max_lag, max_replay_lag=self._max_replay_lag)
        started = time.perf_counter()
        layout = collate(
            batch,
            advantage=self._algorithm.advantage,
            minibatches=self._config.minibatches,
            seed=self._seed,
            exact_engine=self._exact_engine,
            ranks=self.engine.world_size,
            micro_batch_tokens=self._config.micro_batch_tokens,
        )
        collated = time.perf_counter()
        logp_prox = self._proximal(layout)
        prepared = time.perf_counter()
        diagnostics = self._diagnostics()
        trained = [m for m in range(len(layout.minibatches)) if layout.num_tokens(m) > 0]
        steps = self._optimizer_steps(layout, trained * self._config.passes, logp_prox, diagnostics)
        self._name_discarded(batch, trained * self._config.passes, steps)
        applied = [s for s in steps if s.applied]
        self.engine.all_reduce(diagnostics.sums)
        self.version += 1
        return {
            **self._step_metrics(applied),
            **diagnostics.metrics(),
            **batch_metrics(batch, layout),
            "learner/bad_steps": float(len(steps) - len(applied)),
            "learner/empty_minibatches": float(len(layout.minibatches) - len(trained)),
            "learner/optimizer_steps": float(len(applied)),
            "control/budget_share": layout.budget_share,
            "control/ended_early": float(len(steps) < len(trained) * self._config.passes),
            "time/collate_s": collated - started,
            "time/prox_s": prepared - collated,
            "time/train_s": time.perf_counter() - prepared,
        }

    def publish(self, put: Callable[[memoryview], Payload]) -> tuple[WeightManifest, list[Payload]] | None:
        """Hand the weights out, bucket by bucket: rank 0 calls ``put`` with each payload and returns what it got.

        ``put`` copies what it is given: the next bucket takes the same memory. The other ranks take part in the
        gathering and return None. `WeightsNotFinite` if they are not fit to be used.
        """
        self._check_weights()
        canary = self.canary()
        specs, payloads = [], []
        for bucket in self.buckets():
            if bucket is not None:
                spec, payload = bucket
                specs.append(spec)
                payloads.append(put(payload))
        if self.engine.rank != 0:
            return None
        manifest = WeightManifest(version=self.version, buckets=tuple(specs), canary=canary, published_s=time.time())
        return manifest, payloads

    def buckets(self) -> Buckets:
        """The buckets of the current weights; see ``Buckets``."""
        encoder = BucketEncoder()
        for names in bucket_names(self.engine.tensors, bucket_mb=self._config.bucket_mb):
            yield self.engine.gather(names, encoder.encode)

    @torch.no_grad()
    def canary(self) -> Canary:
        """The log-probs (temperature 1) of the canary's tokens under the current weights."""
        tokens_T = torch.from_numpy(self._canary_tokens)
        row = PackedRow(
            token_ids_T=tokens_T,
            position_ids_T=torch.arange(len(tokens_T)),
            index_N=torch.arange(len(tokens_T) - 1),
            target_N=tokens_T[1:],
        )
        logp_N, _ = self._logprobs(row.to(self.engine.device), temperature=1.0)
        return Canary(token_ids=tuple(tokens_T.tolist()), logprobs=tuple(logp_N.tolist()))

    def save(self, directory: Path) -> Path:
        """Write a checkpoint of the current version below ``directory``; returns its path, once it is durable.

        `SaveFailed`, on all ranks alike, if it cannot be written: earlier ones are as they were, and training may go
        on. `WeightsNotFinite` if the weights are not worth saving.
        """
        self._check_weights()
        written = checkpoint.temporary_path(directory, self.version)
        self._on_rank_0(directory, lambda: checkpoint.begin(directory, self.version))
        self._agree(directory, self.engine.save(written) or _failure(lambda: checkpoint.flush(written)))
        self._on_rank_0(directory, lambda: checkpoint.commit(directory, self.version, self.state_dict()))
        keep = {"keep": self._config.keep_checkpoints, "keep_every": self._config.keep_every}
        if self.engine.rank == 0 and (failure := _failure(lambda: checkpoint.prune(directory, **keep))):
            logger.warning("an old checkpoint cannot be removed: %s", failure)
        self.engine.barrier()
        return checkpoint.final_path(directory, self.version)

    def load(self, path: Path) -> None:
        """Restore a checkpoint that `save` wrote, before the first step. ``ValueError`` names what is broken."""
        state = checkpoint.read_state(path)
        try:
            self.load_state_dict(state)
        except KeyError as error:
            raise checkpoint.damaged(path, f"its state lacks {error}") from None
        self.engine.load(path)

    def export(self, directory: Path) -> None:
        """Write the model in Hugging Face format to ``directory``, in place of a model that is already there."""
        export_model(self.engine, model_path=self._model_path, directory=directory, bucket_mb=self._config.bucket_mb)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the engine's own state; a JSON value."""
        return {
            "version": self.version,
            "optimizer_steps": self.num_optimizer_steps,
            "budget": self.budget.state_dict(),
            "seed": self._seed,
            "ranks": self.engine.world_size,
            "zero_stage": self._config.zero_stage,
            "dtype": self.engine.dtype,
            "rng": torch.get_rng_state().numpy().tobytes().hex(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. ``ValueError`` if the state is that of learners laid out differently."""
        laid_out = {
            "learner.ranks": (state["ranks"], self.engine.world_size),
            "learner.zero_stage": (state["zero_stage"], self._config.zero_stage),
            "learner.dtype": (state["dtype"], self.engine.dtype),
        }
        for key, (saved, given) in laid_out.items():
            if saved != given:
                raise ValueError(
                    f"{key}={given}, but the checkpoint was written with {saved}; resume with {key}={saved}"
                )
        self._restore_budget(state["budget"])
        self.version = state["version"]
        self.num_optimizer_steps = state["optimizer_steps"]
        torch.set_rng_state(torch.from_numpy(np.frombuffer(bytes.fromhex(state["rng"]), dtype=np.uint8).copy()))

    def _restore_budget(self, state: dict[str, Any]) -> None:
        """λ and s go on where they were; or anew, where the run goes on with others that know no such state."""
        try:
            self.budget.load_state_dict(state)
        except ValueError as error:
            logger.warning("the budget starts anew: %s", error)
            self.budget = Budget(self._algorithm)

    def _on_rank_0(self, directory: Path, work: Callable[[], object]) -> None:
        """One part of `save`; the others wait for it."""
        self._agree(directory, _failure(work) if self.engine.rank == 0 else "")

    def _agree(self, directory: Path, failure: str) -> None:
        """`SaveFailed` on all ranks if one of them failed; nothing of the attempt stays."""
        failures = [f"rank {rank}: {text}" for rank, text in enumerate(self.engine.texts(failure)) if text]
        if failures:
            if self.engine.rank == 0:
                checkpoint.discard(directory, self.version)
            raise checkpoint.SaveFailed(f"the checkpoint of version {self.version} was not written ({failures[0]})")

    def _proximal(self, layout: TrainingBatch) -> dict[int, np.ndarray]:
        """``logp_prox`` of this rank's samples that need it, by index: the weights have not moved yet."""
        logp_prox: dict[int, np.ndarray] = {}
        with torch.no_grad():
            for members in layout.proximal[self.engine.rank]:
                samples = [layout.samples[i] for i in members]
                row = pack_row([s.trajectory for s in samples])
                logp_N, _ = self._logprobs(row.to(self.engine.device), temperature=self._temperature)
                if samples:
                    logp_prox.update(zip(members, unpack(samples, logp_N.cpu().numpy()), strict=True))
        return logp_prox

    def _optimizer_steps(
        self,
        layout: TrainingBatch,
        minibatches: Sequence[int],
        logp_prox: dict[int, np.ndarray],
        diagnostics: LagDiagnostics,
    ) -> list[OptimizerStep]:
        """One per minibatch, in order, as far as the budget reaches; all ranks stop at the same one.

        With a learning rate of 0 nothing moves, and V is rounding noise: there is nothing for the budget to hold.
        """
        steps: list[OptimizerStep] = []
        if self._config.lr == 0:
            return [self._optimizer_step(layout, m, logp_prox, diagnostics) for m in minibatches]
        self.budget.begin(share=layout.budget_share)
        for m in minibatches:
            steps.append(self._optimizer_step(layout, m, logp_prox, diagnostics))
            if steps[-1].applied and not self.budget.observe(steps[-1].second_moment):
                break
        self.budget.end()
        return steps

    def _optimizer_step(
        self, layout: TrainingBatch, minibatch: int, logp_prox: dict[int, np.ndarray], diagnostics: LagDiagnostics
    ) -> OptimizerStep:
        num_tokens = layout.num_tokens(minibatch)
        denominator = loss_denominator(self._algorithm, num_tokens, layout.num_trajectories(minibatch))
        bins = layout.train[minibatch][self.engine.rank]
        sums = torch.zeros(3 + len(CAUSES), dtype=torch.float64, device=self.engine.device)
        seen = self._diagnostics()
        for i, members in enumerate(bins):
            micro_batch = pack([layout.samples[j] for j in members], [logp_prox.get(j) for j in members])
            loss = self._forward(micro_batch.to(self.engine.device), denominator, sums, seen)
            last = i == len(bins) - 1
            if last:
                self.engine.all_reduce(sums)
                if not sums[0].isfinite():
                    # The gradient may be finite all the same, or not on every rank. This makes it NaN everywhere,
                    # which is how the engine is told to discard a step.
                    loss = loss * nan
            self.engine.backward(loss, last=last)
        lr = self._config.lr * warmup_factor(self.num_optimizer_steps, self._config.warmup_steps)
        lr *= self.budget.scale
        grad_norm, applied = self.engine.step(lr)
        loss_sum, second_moment, entropy, *not_finite = sums.tolist()
        cause = "" if applied else first_cause(not_finite, loss_sum)
        if applied:
            self.num_optimizer_steps += 1
            diagnostics.sums += seen.sums
        return OptimizerStep(loss_sum, second_moment / num_tokens, entropy / num_tokens, grad_norm, lr, cause)

    def _forward(self, micro_batch: MicroBatch, denominator: float, sums: Tensor, seen: LagDiagnostics) -> Tensor:
        """The micro-batch's share of the loss; adds to ``sums``: loss, Σc·(u-1)², Σ entropy, what is not finite."""
        logp_N, entropy_N = self._logprobs(micro_batch.row, temperature=self._temperature)
        tokens = micro_batch.tokens(logp_N)
        loss = self._objective(tokens, denominator, self.budget.lam)
        measured = torch.stack([loss.detach().double(), second_moment_sum(tokens), entropy_N.sum().double()])
        sums += torch.cat([measured, count_not_finite(tokens)])
        seen.add(tokens, micro_batch.lag_N)
        return loss

    def _name_discarded(self, batch: SampledBatch, minibatches: Sequence[int], steps: Sequence[OptimizerStep]) -> None:
        """Write every discarded optimiser step to the log, with its cause and the groups it would have trained on."""
        if self.engine.rank != 0 or all(step.applied for step in steps):
            return
        members = split_minibatches(batch, minibatches=self._config.minibatches, seed=self._seed)
        for number, (m, step) in enumerate(zip(minibatches, steps, strict=False)):
            if not step.applied:
                groups = ", ".join(f"{batch.groups[g].group_id} ({batch.groups[g].group.key})" for g in members[m])
                logger.warning(
                    "learner step %d: optimiser step %d of %d was discarded, not finite: %s; loss %g, gradient norm "
                    "%g; groups (prompts): %s",
                    *(batch.step, number + 1, len(minibatches), step.cause, step.loss, step.grad_norm, groups),
                )

    def _check_weights(self) -> None:
        """`WeightsNotFinite`, on all ranks alike, if a weight of any rank is not a finite number."""
        if self.engine.has_finite_weights():
            return
        if self.num_optimizer_steps == 0:
            raise WeightsNotFinite(
                f"model.path={self._model_path} holds weights that are not finite numbers; use another copy of it"
            )
        raise WeightsNotFinite(
            f"version {self.version} of the weights holds numbers that are not finite, and is neither published nor "
            "saved; go on from the last checkpoint with a lower rate: --resume learner.lr=… --allow-change learner.lr"
        )

    def _logprobs(self, row: PackedRow, *, temperature: float) -> tuple[Tensor, Tensor]:
        return token_logprobs(self.engine.logits(row), row.target_N, temperature)

    def _diagnostics(self) -> LagDiagnostics:
        return LagDiagnostics(weight_cap=self._algorithm.weight_cap, device=self.engine.device)

    def _step_metrics(self, applied: list[OptimizerStep]) -> dict[str, float]:
        metrics = {
            "dual/lambda": self.budget.lam,
            "dual/saturated": float(self.budget.dual.saturated),
            "control/scale": self.budget.scale,
        }
        if applied:
            second_moments = [s.second_moment for s in applied]
            metrics |= {
                "step/loss": _mean([s.loss for s in applied]),
                "step/entropy": _mean([s.entropy for s in applied]),
                "step/grad_norm": _mean([s.grad_norm for s in applied]),
                "step/lr": applied[-1].lr,
                "dual/second_moment": _mean(second_moments),
                "dual/second_moment_max": max(second_moments),
            }
        return metrics


def _failure(work: Callable[[], object]) -> str:
    """What the disk says against ``work``; "" if it is done."""
    try:
        work()
    except OSError as error:
        return str(error)
    return ""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
