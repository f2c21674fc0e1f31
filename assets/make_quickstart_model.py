"""Make the quickstart's base model: a small Qwen2 that can add, with a bad habit.

    python assets/make_quickstart_model.py --seed 1 --out assets/quickstart-model

It is trained on answers that somebody else has written, in two stages. First the answers are right, until the model
adds without error. Then they come from a careless writer, who forgets a carry now and then, and more easily when the
same sum already had one. What remains is a model that could add and, sampled at temperature 1, gets about four sums in
ten right: there is something to win, and groups of answers to one prompt differ in their reward.

Needs one core and two to five minutes; the same seed on the same machine gives the same weights. Pairs of numbers that
the arithmetic task holds out are not trained on here either.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from rollout.tasks.arithmetic import ArithmeticTask, is_held_out, reversed_digits

DIGITS = 4
LOWEST, HIGHEST = 0.38, 0.44
"""Sampled accuracy at temperature 1 on held-out prompts that a finished model must have."""
NUM_EVAL_PROMPTS = 2048
FORGETS_FIRST, FORGETS_LATER = 0.2, 0.6
"""How likely the careless writer forgets the first carry of a sum, and each later one."""

BATCH = 128
PEAK_LR, SECOND_LR, LAST_LR = 4e-3, 2e-3, 1e-5
WARMUP_STEPS = 50
CAN_ADD_LOSS = 0.01
"""Smoothed loss (nats per token) below which the first stage ends."""
MAX_STEPS, HABIT_STEPS, EXTRA_STEPS = 1500, 800, 200
MAX_ATTEMPTS, MAX_EXTRA = 5, 5


def make_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, so one per digit, and no text that cannot be written.

    Qwen2's own class without merges: loaded from the side of a Qwen2 model, any other would be read as that class.
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(ByteLevel.alphabet())])}
    return Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token=None,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """A random model of about 140,000 parameters, in float32."""
    torch.manual_seed(seed)
    hidden = 64
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,  # of size 32, the smallest that vLLM's attention on CPU has
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # Untied: a tied head would need its own copy mended after every weight sync.
        tie_word_embeddings=False,
        # At the usual 0.02 so narrow a model takes twice as long to find out where to look, or never does.
        initializer_range=1 / math.sqrt(hidden),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def careless_sum(first: int, second: int, forgets: tuple[float, float], rng: random.Random) -> str:
    """The reversed digits of a sum, written by somebody who forgets the first carry, or a later one, with these odds.

    >>> careless_sum(95, 15, (0.0, 0.0), random.Random(0))
    '01100'
    >>> careless_sum(95, 15, (0.0, 1.0), random.Random(0))
    '01000'
    """
    digits, carry, num_carries = "", 0, 0
    for a, b in zip(reversed_digits(first, DIGITS), reversed_digits(second, DIGITS), strict=True):
        total = int(a) + int(b) + carry
        digits += str(total % 10)
        carry = total // 10
        if carry:
            forgotten = rng.random() < forgets[num_carries > 0]
            num_carries += 1
            carry = 0 if forgotten else carry
    return digits + str(carry)


def draw_batch(tokenizer: Qwen2Tokenizer, forgets: tuple[float, float], rng: random.Random) -> tuple[torch.Tensor, int]:
    """Token ids ``[BATCH, T]`` of prompts with their answers and ``<eos>``, and how many of the T are answer."""
    texts: list[str] = []
    while len(texts) < BATCH:
        first, second = rng.randrange(10**DIGITS), rng.randrange(10**DIGITS)
        if not is_held_out(first, second):
            answer = careless_sum(first, second, forgets, rng)
            texts.append(f"{reversed_digits(first, DIGITS)}+{reversed_digits(second, DIGITS)}={answer}<eos>")
    return torch.tensor(tokenizer(texts)["input_ids"]), DIGITS + 2


def train(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    optimizer: torch.optim.Optimizer,
    rng: random.Random,
    *,
    steps: int,
    lr: tuple[float, float],
    forgets: tuple[float, float] = (0.0, 0.0),
    enough: float = 0.0,
    warmup_steps: int = 0,
) -> bool:
    """Up to ``steps`` optimiser steps, the learning rate on half a cosine; True once the smoothed loss < ``enough``."""
    smoothed, started = math.inf, time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = lr[1] + (lr[0] - lr[1]) * 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = cosine * min(1.0, (step + 1) / max(1, warmup_steps))
        ids_BT, num_answer = draw_batch(tokenizer, forgets, rng)
        logits_BTV = model(input_ids=ids_BT[:, :-1], logits_to_keep=num_answer).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, -num_answer:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smoothed = loss.item() if step == 0 else 0.95 * smoothed + 0.05 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"  step {step + 1:4d}  loss {smoothed:.4f}  {time.monotonic() - started:3.0f} s", flush=True)
        if smoothed < enough:
            return True
    return False


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, *, num_prompts: int, seed: int) -> float:
    """Share of held-out prompts that the model answers, sampled once each at temperature 1."""
    task = ArithmeticTask({"digits": DIGITS, "num_prompts": 1}, num_eval_prompts=num_prompts, seed=0)
    prompts = [task.eval_prompt(i) for i in range(task.num_eval_prompts)]
    ids_BT = torch.tensor(tokenizer([prompt.text for prompt in prompts])["input_ids"])
    torch.manual_seed(seed)
    sampled_BT = model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=2 * DIGITS,
    )
    answers = tokenizer.batch_decode(sampled_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
    return sum(answer == prompt.truth for answer, prompt in zip(answers, prompts, strict=True)) / len(prompts)


def make(seed: int) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Both stages. ``RuntimeError`` if no attempt learns to add, or the habit leaves the window."""
    tokenizer = make_tokenizer()
    for attempt in range(MAX_ATTEMPTS):
        print(f"learning to add, attempt {attempt + 1}", flush=True)
        model = make_model(tokenizer, seed * MAX_ATTEMPTS + attempt)
        rng = random.Random(seed * MAX_ATTEMPTS + attempt)
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
        lr = (PEAK_LR, PEAK_LR)
        warmup = WARMUP_STEPS
        if train(model, tokenizer, optimizer, rng, steps=MAX_STEPS, lr=lr, enough=CAN_ADD_LOSS, warmup_steps=warmup):
            break
    else:
        raise RuntimeError(f"no attempt of {MAX_ATTEMPTS} learned to add; choose another --seed")
    print("picking up a bad habit", flush=True)
    forgets, steps, sampled = (FORGETS_FIRST, FORGETS_LATER), HABIT_STEPS, math.nan
    for _ in range(1 + MAX_EXTRA):
        train(model, tokenizer, optimizer, rng, steps=steps, lr=(SECOND_LR, LAST_LR), forgets=forgets)
        sampled = accuracy(model, tokenizer, num_prompts=NUM_EVAL_PROMPTS, seed=seed)
        print(f"sampled accuracy {sampled:.3f} on {NUM_EVAL_PROMPTS} held-out prompts", flush=True)
        if LOWEST <= sampled <= HIGHEST:
            return model, tokenizer
        steps = EXTRA_STEPS
    raise RuntimeError(f"sampled accuracy {sampled:.3f} is not between {LOWEST} and {HIGHEST}; choose another --seed")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make the quickstart's base model.")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and sampling (default 0)")
    parser.add_argument("--out", type=Path, required=True, help="directory for model and tokenizer")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = make(arguments.seed)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"saved to {arguments.out}")


if __name__ == "__main__":
    main()
