"""What the JSON files of a model directory say, read as files that anybody may have written.

Nothing is imported of what will load the model: transformers' own list of architectures is read as text.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from r2vpo.job.settings import ConfigError

GENERATING = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""How the names of architectures end that produce text."""


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. ``ConfigError`` if there is none."""
    where = f"model.path={file.parent}: {file.name}"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not valid JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is of type {type(value).__name__}, not an object; fetch it again")
    return value


def text_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The part of config.json about text: its ``text_config`` if it has one, else all of it."""
    inner = settings.get("text_config")
    return inner if isinstance(inner, dict) else settings


def architecture_of(settings: dict[str, Any]) -> str:
    """First entry of ``architectures``, or `unknown`."""
    names = settings.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else "unknown"


def check_architecture(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse a model that writes no text, and one that only code of its own could build. ``ConfigError``."""
    where, name = f"model.path={directory}", architecture_of(settings)
    if settings.get("is_encoder_decoder") is True or (name != "unknown" and not name.endswith(GENERATING)):
        raise ConfigError(
            f"{where} is a {name}, which does not continue a text; choose a causal language model (Llama, Qwen, "
            "Mistral, Gemma, …)"
        )
    kind = settings.get("model_type")
    if isinstance(kind, str) and not _is_known_to_transformers(kind):
        code = " and brings its own code, which the learner never runs" if "auto_map" in settings else ""
        raise ConfigError(
            f"{where} has model_type={kind}, which the installed transformers does not know{code}; choose an "
            "architecture that transformers has itself (Llama, Qwen, Mistral, Gemma, …)"
        )


def check_vocabulary(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse a tokenizer whose tokens the model's embedding does not have. ``ConfigError``."""
    file, size = directory / "tokenizer.json", text_settings(settings).get("vocab_size")
    if not file.is_file():
        return
    largest = max(_token_ids(read_object(file)), default=-1)
    if isinstance(size, int) and largest >= size:
        raise ConfigError(
            f"model.path={directory}: tokenizer.json has token {largest}, but the model's embedding ends at "
            f"{size - 1} (vocab_size={size} in config.json); put the tokenizer there that the model was trained with"
        )


def _token_ids(tokenizer: dict[str, Any]) -> list[int]:
    """Ids of a tokenizer.json: of its vocabulary (a mapping to ids, or a list of entries) and of its added tokens."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = tokenizer.get("added_tokens")
    ids: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [len(vocabulary) - 1] if isinstance(vocabulary, list) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    return [number for number in ids if isinstance(number, int)]


def _is_known_to_transformers(model_type: str) -> bool:
    """Whether transformers builds this kind of model with its own code; True where that cannot be seen."""
    found = importlib.util.find_spec("transformers")
    if found is None or not found.submodule_search_locations:
        return True
    listed = Path(found.submodule_search_locations[0], "models", "auto", "auto_mappings.py")
    return not listed.is_file() or f'("{model_type}", ' in listed.read_text(encoding="utf-8")
