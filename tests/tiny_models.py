"""Random models of the supported architectures, small enough to be made inside a test."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CHARACTERS = "0123456789+="
EOS, PAD = len(CHARACTERS), len(CHARACTERS) + 1
VOCABULARY = len(CHARACTERS) + 2
CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}


def make_model(
    directory: Path,
    *,
    kind: str = "qwen2",
    tied: bool = True,
    endless: bool = False,
    hidden: int = 64,
    intermediate: int = 128,
    layers: int = 2,
) -> PreTrainedModel:
    """A random model with a character tokenizer, saved in ``directory``; an endless one never stops by itself."""
    config_class, model_class = CLASSES[kind]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=hidden // 2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None if endless else EOS,
        pad_token_id=PAD,
    )
    model = model_class(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)  # peaked enough that a wrong matrix moves log-probs by nats
    model.save_pretrained(directory)
    _make_tokenizer(endless).save_pretrained(directory)
    return model


def _make_tokenizer(endless: bool) -> PreTrainedTokenizerFast:
    vocabulary = {c: i for i, c in enumerate([*CHARACTERS, "<eos>", "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>"} | ({} if endless else {"eos_token": "<eos>"})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def log_probs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """``[T - 1]``: log-prob of every token after the first, at temperature 1."""
    with torch.no_grad():
        scores = model(torch.tensor([token_ids])).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]
