"""What the objective and its statistics cost, as a share of a learner step of the real learner (DeepSpeed, one rank).

The quickstart's model and batch. A step is timed as a whole; then the objective with its gradient, the second moment
and the diagnostics by lag are timed alone on micro-batches of the same sizes, as often as the step runs them.
"""

from __future__ import annotations

import logging
import socket
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.table import at_most, emit
from learner.collate import MicroBatch, TrainingBatch, collate, pack
from learner.config import LearnerConfig
from learner.engine import init_distributed
from learner.trainer import LearnerTrainer
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.diagnostics import LagDiagnostics
from r2vpo.algorithm.objectives import TokenBatch, objective, second_moment_sum
from r2vpo.records import NO_VERSION, Kind, Outcome, SampledBatch, SampledGroup, Trajectory, TrajectoryGroup

MODEL = "assets/quickstart-model"
NUM_GROUPS, GROUP_SIZE, PROMPT_TOKENS, RESPONSE_TOKENS, VOCABULARY = 32, 8, 10, 6, 16
STEPS = 12
LAG = 4


def cost_share() -> float:
    """Median seconds of the objective and its statistics over median seconds of a learner step."""
    logging.disable(logging.WARNING)
    init_distributed(rank=0, world_size=1, address="127.0.0.1", port=_free_port(), timeout_s=60)
    config = LearnerConfig(
        groups_per_step=NUM_GROUPS, minibatches=4, lr=2e-4, micro_batch_tokens=512, dtype="float32", steps=STEPS
    )
    algorithm = AlgorithmConfig()
    trainer = LearnerTrainer(
        config,
        algorithm,
        model_path=MODEL,
        temperature=1.0,
        max_lag=LAG,
        max_replay_lag=LAG,
        exact_engine=True,
        seed=0,
    )
    steps, extras = [], []
    for step in range(STEPS):
        batch = _batch(step)
        steps.append(_seconds(lambda batch=batch: trainer.step(batch)))
        layout = collate(
            batch,
            advantage=algorithm.advantage,
            minibatches=config.minibatches,
            seed=0,
            exact_engine=True,
            ranks=1,
            micro_batch_tokens=config.micro_batch_tokens,
        )
        extras.append(_extras(layout, algorithm))
    return statistics.median(extras[2:]) / statistics.median(steps[2:])


def _extras(layout: TrainingBatch, algorithm: AlgorithmConfig) -> float:
    """Seconds of objective, its gradient, second moment and diagnostics over all micro-batches of the step."""
    loss = objective(algorithm)
    diagnostics = LagDiagnostics(weight_cap=algorithm.weight_cap)
    seconds = 0.0
    for minibatch, ranks in enumerate(layout.train):
        for members in ranks[0]:
            samples = [layout.samples[i] for i in members]
            micro_batch = pack(samples, [None] * len(samples))
            logp_N = torch.full((int(micro_batch.lag_N.numel()),), -1.0, requires_grad=True)
            tokens = micro_batch.tokens(logp_N)

            def work(tokens: TokenBatch = tokens, packed: MicroBatch = micro_batch, m: int = minibatch) -> None:
                loss(tokens, layout.num_tokens(m), 0.5).backward()
                second_moment_sum(tokens)
                diagnostics.add(tokens, packed.lag_N)

            seconds += _seconds(work)
    return seconds


def _batch(step: int) -> SampledBatch:
    rng = np.random.default_rng(step)
    version = max(step - LAG, 0)
    length = PROMPT_TOKENS + RESPONSE_TOKENS
    mask_T = np.arange(length) >= PROMPT_TOKENS
    groups = [
        SampledGroup(
            group_id=i + 1,
            kind=Kind.FRESH,
            uses=0,
            group=TrajectoryGroup(
                key=f"0.{i}",
                prompt="",
                truth=None,
                trajectories=tuple(
                    Trajectory(
                        token_ids_T=rng.integers(1, VOCABULARY, length).astype(np.int32),
                        loss_mask_T=mask_T,
                        behavior_logprob_T=np.where(mask_T, -2.5, 0.0).astype(np.float32),
                        version_T=np.where(mask_T, version, NO_VERSION).astype(np.int32),
                        outcome=Outcome.SCORED,
                        reward=float(member % 2),
                    )
                    for member in range(GROUP_SIZE)
                ),
            ),
        )
        for i in range(NUM_GROUPS)
    ]
    return SampledBatch(step=step, groups=tuple(groups))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    emit(at_most("objective and statistics ÷ learner step", share, "share", 0.03) for share in [cost_share()])
