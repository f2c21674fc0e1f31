"""The start weights: supervised on right answers until the policy is right as often as the task asks for.

    python -m benchmarks.evidence.warmup [TASK SIZE SEED]…

They are kept in ``build/evidence/TASK-SIZE-SEED.safetensors``, and made when a run first asks for them.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.evidence.model import Decoder
from benchmarks.evidence.tasks import Task, make_task, prompts
from benchmarks.table import REPOSITORY

FOLDER = REPOSITORY / "build" / "evidence"
START = {"addition4": 0.34, "addition8": 0.033, "sorting10": 0.1}
"""Accuracy at which the warm-up ends: the chance that a right answer is sampled, over held-out prompts."""
_LR = {"0.1M": 3e-3, "0.4M": 1e-3, "1.6M": 1e-3}
_BATCH = 128
_MAX_STEPS = 6000
_LOOK_EVERY = 10
_LOOK_PROMPTS = 512
_LR_WARMUP_STEPS = 100


def start_model(task_name: str, size: str, seed: int) -> Decoder:
    """The start weights of a task, size and seed; made and kept if they are not there."""
    path = FOLDER / f"{task_name}-{size}-{seed}.safetensors"
    model = new_model(make_task(task_name), size, seed)
    if not path.exists():
        accuracy = warm_up(model, make_task(task_name), target=START[task_name], lr=_LR[size], seed=seed)
        print(f"{task_name} {size} {seed}: starts at {accuracy:.3f}", file=sys.stderr, flush=True)
        FOLDER.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")
        save_file(model.state_dict(), half)
        half.rename(path)
    model.load_state_dict(load_file(path))
    return model


def new_model(task: Task, size: str, seed: int) -> Decoder:
    """A model of random weights that fits the task."""
    return Decoder(
        size=size,
        vocabulary=task.vocabulary,
        prompt_tokens=task.prompt_tokens,
        answer_tokens=task.answer_tokens,
        seed=seed,
    )


def warm_up(model: Decoder, task: Task, *, target: float, lr: float, seed: int) -> float:
    """Train on right answers until the sampled accuracy on held-out prompts reaches ``target``; returns it.

    ``RuntimeError`` if it does not within 6,000 steps.
    """
    torch.set_num_threads(1)
    rng, began_s, accuracy = np.random.default_rng(seed), time.perf_counter(), 0.0
    held_out_BP = prompts(task, rng, _LOOK_PROMPTS, held_out=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(1, _MAX_STEPS + 1):
        loss = -_right(model, task, prompts(task, rng, _BATCH, held_out=False)).mean() / task.answer_tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / _LR_WARMUP_STEPS)
        optimizer.step()
        # Accuracy jumps late and fast: look more often once it moves, so as to stop near the target.
        if step % (_LOOK_EVERY if accuracy < target / 10 else 2) == 0:
            with torch.no_grad():
                accuracy = _right(model, task, held_out_BP).exp().mean().item()
        if step % 100 == 0 or accuracy >= target:
            took_s = time.perf_counter() - began_s
            line = f"{step:5d} steps, {took_s:3.0f} s, loss {loss.item():.3f}, {accuracy:.3f}"
            print(line, file=sys.stderr, flush=True)
        if accuracy >= target:
            return accuracy
    raise RuntimeError(f"the warm-up did not reach {target} in {_MAX_STEPS} steps; it stands at {accuracy:.3f}")


def _right(model: Decoder, task: Task, prompt_BP: np.ndarray) -> torch.Tensor:
    """Log-prob of the right answer, ``[B]``; its exponential is the chance to sample it."""
    answer_B1T = torch.from_numpy(task.solve(prompt_BP))[:, None]
    return model.logp(torch.from_numpy(prompt_BP), answer_B1T).sum(dim=(1, 2))


if __name__ == "__main__":
    for name, width, number in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True):
        start_model(name, width, int(number))
