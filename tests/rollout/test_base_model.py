"""The quickstart's base model: small, readable by the usual loaders, and with room to improve."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rollout.config import TaskConfig
from rollout.tasks.factory import make_task

REPOSITORY = Path(__file__).parents[2]
SHIPPED = REPOSITORY / "assets" / "quickstart-model"
SCRIPT = REPOSITORY / "assets" / "make_quickstart_model.py"


def load(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    return model, AutoTokenizer.from_pretrained(directory, local_files_only=True)


def accuracy(directory: Path, *, temperature: float) -> float:
    """Share of the quickstart's held-out prompts that the model solves; temperature 0 is greedy."""
    model, tokenizer = load(directory)
    settings = OmegaConf.load(REPOSITORY / "configs" / "quickstart.yaml")
    task = make_task(TaskConfig(**OmegaConf.to_container(settings.task)), seed=0)
    prompts = [task.eval_prompt(i) for i in range(task.num_eval_prompts)]
    ids_BT = torch.tensor(tokenizer([prompt.text for prompt in prompts])["input_ids"])
    torch.manual_seed(0)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    sampled_BT = model.generate(
        ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=settings.rollout.max_tokens, **how
    )
    answers = tokenizer.batch_decode(sampled_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
    return sum(answer == prompt.truth for answer, prompt in zip(answers, prompts, strict=True)) / len(prompts)


def test_the_base_model_is_small():
    model, _ = load(SHIPPED)
    assert model.num_parameters() <= 1_000_000
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 4_000_000


def test_the_base_model_is_an_untied_qwen2_in_float32_that_ends_with_eos_and_starts_with_nothing():
    model, tokenizer = load(SHIPPED)
    assert model.config.architectures == ["Qwen2ForCausalLM"]
    assert model.dtype == torch.float32
    assert not model.config.tie_word_embeddings
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.bos_token_id is None
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("text", ["4321+8765=", "What is 12  + 95?\n\tI'll say: 107", "π ≈ 3.14, 漢字 😀"])
def test_every_byte_is_a_token_and_comes_back(text):
    _, tokenizer = load(SHIPPED)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_the_base_model_solves_some_held_out_prompts_and_not_most():
    assert 0.30 <= accuracy(SHIPPED, temperature=1.0) <= 0.50
    assert accuracy(SHIPPED, temperature=0.0) <= 0.75


@pytest.mark.slow
def test_the_script_makes_an_equivalent_model_from_another_seed(tmp_path):
    command = [sys.executable, str(SCRIPT), "--seed", "0", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=REPOSITORY)
    assert load(tmp_path)[0].num_parameters() == load(SHIPPED)[0].num_parameters()
    assert 0.30 <= accuracy(tmp_path, temperature=1.0) <= 0.50
