"""What a plan must know of a model: its shape, from config.json, and its number of parameters. No weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from r2vpo.job.config import ConfigError
from r2vpo.job.model_files import architecture_of, read_object, text_settings

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder of standard attention."""

    architecture: str
    num_parameters: int
    """Tied matrices count once."""
    layers: int
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width of the feed-forward layer; of a mixture of experts, of all that one token passes through."""
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together; the values have as much."""
    vocabulary: int
    dtype: str
    """Type that the weights are stored in."""


def read_shape(directory: Path, *, num_parameters: int | None) -> ModelShape:
    """The model whose config.json lies in ``directory``.

    Without ``num_parameters`` they are counted on a model without memory, which takes torch and some seconds.
    ``ConfigError`` if config.json does not say what is needed.
    """
    settings = read_object(directory / "config.json")
    text = text_settings(settings)
    try:
        heads = text["num_attention_heads"]
        head_dim = text.get("head_dim") or text["hidden_size"] // heads
        experts = text.get("num_experts_per_tok") or 1
        wide = text.get("moe_intermediate_size") if experts > 1 else None
        return ModelShape(
            architecture=architecture_of(settings),
            num_parameters=_count(directory) if num_parameters is None else num_parameters,
            layers=text["num_hidden_layers"],
            hidden=text["hidden_size"],
            intermediate=experts * (wide or text.get("intermediate_size") or 4 * text["hidden_size"]),
            query=heads * head_dim,
            key_value=(text.get("num_key_value_heads") or heads) * head_dim,
            vocabulary=text["vocab_size"],
            dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
        )
    except KeyError as missing:
        raise ConfigError(
            f"model.path={directory}: config.json does not say {missing}, so its memory cannot be planned; name a "
            "model with standard attention (Llama, Qwen, Mistral, Gemma, …)"
        ) from None


def _count(directory: Path) -> int:
    """Parameters of the model that config.json describes, on torch's meta device, which holds shapes only."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.path={directory}: transformers cannot build this model ({reason})") from None
    return sum(parameter.numel() for parameter in model.parameters())
