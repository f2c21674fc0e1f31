"""One run: sample, learn, measure; synchronous, in one process, deterministic.

prompts ──sample (weights of version step - lag)──▶ fresh groups ──┬─▶ batch ──▶ learner step ──▶ version + 1
                                      replay list ──stale groups───┘
                                           ▲──────── fresh groups, after the step
"""

from __future__ import annotations

import copy
import time
from collections import deque
from statistics import fmean
from typing import Any

import numpy as np
import torch

from benchmarks.evidence.learner import Learner
from benchmarks.evidence.model import Decoder, sample
from benchmarks.evidence.pool import Groups, ReplayList, concatenate
from benchmarks.evidence.setting import Setting
from benchmarks.evidence.tasks import Task, make_task, prompts, rewards
from benchmarks.evidence.warmup import start_model

GROUPS, MEMBERS = 32, 8
EVALUATE_EVERY = 5
FINAL_PROMPTS = 2048
HELD_OUT_SEED = 1_000_003


def run(setting: Setting) -> dict[str, Any]:
    """The result of one run, a JSON value.

    ``curve`` has a list per figure with an entry per iteration; ``evaluations`` holds [iteration, accuracy] on 512
    held-out prompts; ``final`` has the accuracy (on 2,048 of them), pass@8 (256) and greedy accuracy (512) of the last
    weights. Raises ``RuntimeError`` if a gradient is not finite.
    """
    torch.set_num_threads(1)
    began_s = time.perf_counter()
    loop = _Loop(setting)
    curve: dict[str, list[float]] = {}
    evaluations = [[0, loop.accuracy()]]
    for step in range(setting.iterations):
        for name, value in loop.iterate(step).items():
            curve.setdefault(name, []).append(_rounded(value))
        if (step + 1) % EVALUATE_EVERY == 0:
            evaluations.append([step + 1, loop.accuracy()])
    return {
        "id": setting.id,
        "setting": setting.to_json(),
        "curve": curve,
        "evaluations": evaluations,
        "final": loop.final(),
        "wall_s": round(time.perf_counter() - began_s, 2),
    }


class _Loop:
    """The state of a run."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._task: Task = make_task(setting.task)
        self._model = start_model(setting.task, setting.size, setting.seed)
        self._sampler = copy.deepcopy(self._model)
        self._learner = Learner(self._model, setting)
        # One generator per use: a setting that draws more of one kind leaves the others as they are (paired seeds).
        self._prompts, self._flips, draws = (np.random.default_rng([setting.seed, use]) for use in range(3))
        self._sampling = torch.Generator().manual_seed(setting.seed)
        self._replay = ReplayList(max_age=setting.max_age, priority=setting.priority, rng=draws)
        self._versions: deque[dict[str, torch.Tensor]] = deque(maxlen=setting.lag + 1)
        self._num_tokens = 0

    def iterate(self, step: int) -> dict[str, float]:
        """One learner step with its sampling; the figures of the curve."""
        fresh, accuracy, entropy = self._sample(step)
        stale = self._replay.draw((self._setting.reuse - 1) * GROUPS)
        report = self._learner.step(concatenate([fresh, *stale]), step=step)
        self._replay.append(fresh)
        self._num_tokens += report.tokens
        return {
            "rollouts": (step + 1) * GROUPS * MEMBERS,
            "optimizer_steps": self._learner.num_optimizer_steps,
            "tokens": self._num_tokens,
            "train_reward": accuracy,
            "second_moment": fmean(report.second_moments),
            "second_moment_max": max(report.second_moments),
            "lam": report.lam,
            "step_scale": report.step_scale,
            "entropy": entropy,
            "grad_norm": fmean(report.grad_norms),
        }

    def accuracy(self) -> float:
        """Sampled accuracy on 512 held-out prompts, always the same ones, with the same random numbers."""
        return float(self._held_out_rewards(512, 1, greedy=False).mean())

    def final(self) -> dict[str, float]:
        """Figures of the last weights."""
        return {
            "accuracy": float(self._held_out_rewards(FINAL_PROMPTS, 1, greedy=False).mean()),
            "pass_at_8": float(self._held_out_rewards(256, 8, greedy=False).max(axis=1).mean()),
            "greedy_accuracy": float(self._held_out_rewards(512, 1, greedy=True).mean()),
        }

    def _sample(self, step: int) -> tuple[Groups, float, float]:
        """Fresh groups, their accuracy before any reward is flipped, and the entropy of sampling."""
        version = max(step - self._setting.lag, 0)
        prompt_BP = prompts(self._task, self._prompts, GROUPS, held_out=False)
        prompt = torch.from_numpy(prompt_BP)
        sampled = sample(self._weights_of_lag(), prompt, MEMBERS, self._sampling)
        reward_Bn = rewards(self._task, prompt_BP, sampled.answer_BnT.numpy())
        flipped_Bn = self._flips.random(reward_Bn.shape) < self._setting.flip
        groups = Groups(
            prompt_BP=prompt,
            answer_BnT=sampled.answer_BnT,
            behavior_logp_BnT=sampled.logp_BnT,
            reward_Bn=torch.from_numpy(np.where(flipped_Bn, 1 - reward_Bn, reward_Bn)),
            version_B=torch.full((GROUPS,), version),
            born_B=torch.full((GROUPS,), step),
            draw_weight_B=torch.ones(GROUPS),
        )
        return groups, float(reward_Bn.mean()), sampled.entropy

    def _weights_of_lag(self) -> Decoder:
        """The model as it was `lag` learner steps ago, or at the start."""
        if self._setting.lag == 0:
            return self._model
        self._versions.append({name: value.clone() for name, value in self._model.state_dict().items()})
        self._sampler.load_state_dict(self._versions[0])
        return self._sampler

    def _held_out_rewards(self, count: int, members: int, *, greedy: bool) -> np.ndarray:
        prompt_BP = prompts(self._task, np.random.default_rng(HELD_OUT_SEED), count, held_out=True)
        generator = None if greedy else torch.Generator().manual_seed(HELD_OUT_SEED)
        answer_BnT = sample(self._model, torch.from_numpy(prompt_BP), members, generator).answer_BnT
        return rewards(self._task, prompt_BP, answer_BnT.numpy())


def _rounded(value: float) -> float:
    """Five digits are enough, and keep a results file small."""
    return float(f"{value:.5g}")
