"""Scenarios on one real engine; each prints one JSON line. ``python -m tests.rollout.engine_scenarios NAME FOLDER``."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from rollout.config import RolloutConfig
from rollout.environment import engine_environment

CONFIG = RolloutConfig(
    max_tokens=400, max_model_len=512, kv_cache_gb=0.05, group_size=4, groups_in_flight=4, enforce_eager=True
)
os.environ.update(engine_environment(CONFIG, on_gpu=False))

import numpy as np  # noqa: E402 - the environment comes before torch and vLLM
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

from rollout.engine import RolloutEngine  # noqa: E402
from rollout.generation import request_seed  # noqa: E402
from tests.tiny_models import log_probs, make_model  # noqa: E402

PROMPT = [1, 2, 3, 4, 10, 4, 3, 2, 1, 11]


async def start(directory: Path) -> RolloutEngine:
    return await RolloutEngine.start(
        CONFIG, model_path=str(directory), on_gpu=False, trust_remote_code=False, transport="object_store"
    )


def perturb(model: PreTrainedModel, file: Path) -> None:
    """Move every weight and write the state as the learner would: tied matrices once."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, file)


async def parity(directory: Path, kind: str, tied: str) -> dict:
    model = make_model(directory, kind=kind, tied=tied == "True")
    engine = await start(directory)
    before = await engine.prompt_logprobs(PROMPT)
    gaps = [float(np.abs(before - log_probs(model, PROMPT).numpy()).max())]
    for version in (1, 2):
        perturb(model, directory / "update.safetensors")
        async with engine.paused():
            await engine.load([{"path": str(directory / "update.safetensors")}], version=version)
        after = await engine.prompt_logprobs(PROMPT)
        gaps.append(float(np.abs(after - log_probs(model, PROMPT).numpy()).max()))
    engine.shutdown()
    return {"gaps": gaps, "moved": float(np.abs(after - before).max())}


async def spans(directory: Path) -> dict:
    model = make_model(directory, endless=True)
    engine = await start(directory)
    task = asyncio.create_task(engine.generate(PROMPT, n=1, seed=0, temperature=1.0, max_tokens=400))
    models = {0: make_model(directory, endless=True)}
    for version in (1, 2, 3):
        await asyncio.sleep(0.05)
        perturb(model, directory / "update.safetensors")
        models[version] = make_model(directory, endless=True)
        models[version].load_state_dict(model.state_dict())
        async with engine.paused():
            await engine.load([{"path": str(directory / "update.safetensors")}], version=version)
    [completion] = await task
    sequence = PROMPT + completion.token_ids_T.tolist()
    gaps = []
    for version, policy in models.items():
        expected = log_probs(policy, sequence)[len(PROMPT) - 1 :].numpy()
        mine = completion.version_T == version
        gaps += np.abs(expected - completion.logprob_T)[mine].tolist()
    engine.shutdown()
    return {"versions": completion.version_T.tolist(), "tokens": len(completion.token_ids_T), "gap": max(gaps)}


async def seeds(directory: Path) -> dict:
    make_model(directory, endless=True)
    engine = await start(directory)

    async def group(key: str) -> list[list[int]]:
        made = await engine.generate(PROMPT, n=4, seed=request_seed(0, key), temperature=1.0, max_tokens=12)
        return [c.token_ids_T.tolist() for c in made]

    result = {"first": await group("0.0"), "again": await group("0.0"), "other": await group("0.1")}
    engine.shutdown()
    return result


async def temperature(directory: Path) -> dict:
    model = make_model(directory, endless=True)
    engine = await start(directory)
    [completion] = await engine.generate(PROMPT, n=1, seed=0, temperature=0.5, max_tokens=20)
    sequence = PROMPT + completion.token_ids_T.tolist()
    with torch.no_grad():
        scores = (model(torch.tensor([sequence])).logits[0, :-1] / 0.5).log_softmax(-1)
    expected = scores.gather(1, torch.tensor(sequence[1:])[:, None])[len(PROMPT) - 1 :, 0].numpy()
    engine.shutdown()
    return {"gap": float(np.abs(expected - completion.logprob_T).max())}


async def crowd(directory: Path) -> dict:
    """More tokens to recompute after a sync than the engine computes at once, and a prompt that does not fit."""
    model = make_model(directory, endless=True)
    engine = await start(directory)
    groups = [
        asyncio.create_task(engine.generate(PROMPT * 16, n=4, seed=seed, temperature=1.0, max_tokens=100))
        for seed in range(0, 64, 4)
    ]
    perturb(model, directory / "update.safetensors")
    await engine.generate(PROMPT, n=1, seed=99, temperature=1.0, max_tokens=10)  # the crowd is as far by then
    async with engine.paused():
        await engine.load([{"path": str(directory / "update.safetensors")}], version=1)
    completions = [completion for group in await asyncio.gather(*groups) for completion in group]
    refused = ""
    try:
        await engine.generate(PROMPT * 60, n=4, seed=0, temperature=1.0, max_tokens=4)
    except ValueError as error:
        refused = str(error)
    alive = len(await engine.generate(PROMPT, n=1, seed=0, temperature=1.0, max_tokens=4))
    engine.shutdown()
    return {
        "lengths": sorted({len(c.token_ids_T) for c in completions}),
        "crossed": sum(len(np.unique(c.version_T)) == 2 for c in completions),
        "refused": refused,
        "alive": alive,
    }


SCENARIOS = {f.__name__: f for f in (parity, spans, seeds, temperature, crowd)}

if __name__ == "__main__":
    name, *arguments = sys.argv[1].split()
    print(json.dumps(asyncio.run(SCENARIOS[name](Path(sys.argv[2]), *arguments))))
