"""Cheap checks of what a run needs, before anything heavy starts: the model's files, the task, the space on disk.

Nothing is created, and no Ray, torch or vLLM is imported: what is wrong is said within a second or two.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r2vpo.job.config import RunConfig
from r2vpo.job.model_files import architecture_of, check_architecture, check_vocabulary, read_object, text_settings
from r2vpo.job.prompt_lengths import check_lengths
from r2vpo.job.ray_address import check_cluster
from r2vpo.job.settings import ConfigError
from rollout.tasks.base import Task

GIB = 2**30
SPACE_BYTES = GIB
"""Space that a run needs beside its checkpoints: store, logs, metrics."""
CHECKPOINT_BYTES_PER_PARAMETER = 14
"""float32 weights and both moments of Adam, and the weights in the type they are trained in."""
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the model's files say."""

    directory: Path | None
    """Where the files lie; None for a model that is still on the hub."""
    architecture: str = "unknown"
    """First entry of `architectures` in config.json."""
    num_parameters: int | None = None
    """Elements of all tensors in the weight files."""
    max_positions: int | None = None
    """Longest sequence (tokens) the model was made for."""


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """What is known about a run before it starts."""

    model: ModelFacts
    num_prompts: int
    """Training prompts of one epoch."""
    num_eval_prompts: int
    """Held-out prompts."""
    free_bytes: int
    """Free space where the run will write."""
    notes: tuple[str, ...] = ()
    """Sentences on what works, but not as one might expect."""


def preflight(config: RunConfig) -> Preflight:
    """Check what can be checked cheaply. Raises ``ConfigError`` naming the setting and the fix."""
    model = _check_model(config)
    task = _check_task(config)
    window, directory, address = config.rollout.max_model_len, model.directory, config.ray.address
    return Preflight(
        model=model,
        num_prompts=task.num_prompts,
        num_eval_prompts=task.num_eval_prompts,
        free_bytes=_check_space(config, model),
        notes=(
            *(() if directory is None else check_lengths(task, directory, window=window)),
            *(() if address is None else check_cluster(address)),
        ),
    )


def _check_model(config: RunConfig) -> ModelFacts:
    path = Path(config.model.path)
    directory = path if path.is_dir() else None
    if directory is None:
        if path.exists():
            raise ConfigError(
                f"model.path={path} is a file; name the directory that holds config.json and *.safetensors"
            )
        if not _may_be_hub_id(config.model.path):
            raise ConfigError(f"model.path={path} does not exist; name a model directory, or a hub id such as org/name")
        directory = _find_on_hub(config.model.path)
        if directory is None:
            return ModelFacts(directory=None)
    facts = read_model(directory)
    if config.task.chat and not _has_chat_template(directory):
        raise ConfigError(f"task.chat=true, but the tokenizer in {directory} has no chat template; set task.chat=false")
    if facts.max_positions is not None and facts.max_positions < config.rollout.max_model_len:
        raise ConfigError(
            f"rollout.max_model_len={config.rollout.max_model_len} exceeds the {facts.max_positions} positions of the "
            f"model in {directory}; set rollout.max_model_len to {facts.max_positions} or less"
        )
    return facts


def read_model(directory: Path) -> ModelFacts:
    """The facts of a model directory in Hugging Face format. Raises ``ConfigError`` if it cannot be trained from."""
    where = f"model.path={directory}"
    file = directory / "config.json"
    if not file.is_file():
        raise ConfigError(f"{where} has no config.json; name the directory of a Hugging Face model")
    settings = read_object(file)
    check_architecture(directory, settings)
    weights = sorted(file for file in directory.glob("*.safetensors") if file.is_file())
    if not weights:
        pickled = sorted(entry.name for pattern in ("*.bin", "*.pt", "*.pth") for entry in directory.glob(pattern))
        if pickled:
            raise ConfigError(
                f"{where} has only {pickled[0]}: pickled weights can run code when they are read, so they are refused; "
                "convert them with save_pretrained, which writes *.safetensors"
            )
        raise ConfigError(f"{where} has no *.safetensors; name a directory with the model's weights")
    if not any(
        (directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    ):
        raise ConfigError(f"{where} has no tokenizer (tokenizer.json); save it there with tokenizer.save_pretrained")
    check_vocabulary(directory, settings)
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ConfigError(f"{where}: {index.name} has no weight_map from tensors to files; fetch it again")
        shards = set(weight_map.values())
        if absent := sorted(shards - {entry.name for entry in weights}):
            raise ConfigError(f"{where} lacks {absent[0]}, which model.safetensors.index.json names; fetch it again")
        weights = [directory / name for name in sorted(shards)]
    return ModelFacts(
        directory=directory,
        architecture=architecture_of(settings),
        num_parameters=sum(_count_parameters(entry) for entry in weights),
        max_positions=_max_positions(text_settings(settings)),
    )


def _count_parameters(file: Path) -> int:
    """Elements of the tensors in a safetensors file; its header and length also tell a whole file from half of one."""
    problem = ConfigError(
        f"model.path={file.parent}: {file.name} is not a complete safetensors file (an interrupted download, or a "
        "pointer of git-lfs); fetch it again"
    )
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= file.stat().st_size - 8:
            raise problem
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            tensors = [entry for name, entry in header.items() if name != "__metadata__"]
            num_bytes = max((entry["data_offsets"][1] for entry in tensors), default=0)
            num_parameters = sum(math.prod(entry["shape"]) for entry in tensors)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise problem from None  # no header of the format, whatever it is
    if 8 + length + num_bytes != file.stat().st_size:
        raise problem
    return num_parameters


def _max_positions(settings: dict[str, Any]) -> int | None:
    """``max_position_embeddings``, times the factor by which a rope scaling stretches it."""
    positions = settings.get("max_position_embeddings")
    if not isinstance(positions, int):
        return None
    scaling = settings.get("rope_scaling") or settings.get("rope_parameters")
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    return int(positions * factor) if isinstance(factor, int | float) and factor > 0 else positions


def _has_chat_template(directory: Path) -> bool:
    if (directory / "chat_template.jinja").is_file() or (directory / "chat_template.json").is_file():
        return True
    file = directory / "tokenizer_config.json"
    return file.is_file() and '"chat_template"' in file.read_text(encoding="utf-8")


def _may_be_hub_id(text: str) -> bool:
    """Whether ``org/name`` is meant, rather than a local path that is missing."""
    looks_like_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text, flags=re.ASCII) is not None
    return looks_like_id and not Path(text).parent.exists()


def _find_on_hub(model_id: str) -> Path | None:
    """The folder of a cached hub model, or None if the hub has it and it is still to be fetched."""
    readings = f"model.path={model_id} is no local directory (seen from {Path.cwd()})"
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ConfigError(f"{readings}, and for a model on the hub huggingface_hub must be installed")
    from huggingface_hub import HfApi, try_to_load_from_cache

    cached = try_to_load_from_cache(model_id, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent
    try:
        files = HfApi().model_info(model_id, timeout=HUB_TIMEOUT_S).siblings or []
    except Exception as error:  # noqa: BLE001 - the hub's client lets errors of several libraries through
        raise ConfigError(
            f"{readings}, and as an id on the Hugging Face hub it is neither cached nor to be had "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}); correct the "
            "path, or fetch the model where there is a network"
        ) from None
    if not any(file.rfilename.endswith(".safetensors") for file in files):
        raise ConfigError(
            f"model.path={model_id}: the model on the hub has no *.safetensors; pickled weights are refused"
        )
    return None


def _check_task(config: RunConfig) -> Task:
    from rollout.tasks.factory import make_task

    try:
        task = make_task(config.task, seed=config.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if task.num_prompts < 1:
        raise ConfigError(f"task.name={config.task.name} has no training prompt")
    if task.num_eval_prompts < 1:
        raise ConfigError(f"task.name={config.task.name} has no held-out prompt; give task.eval_path or more rows")
    return task


def _check_space(config: RunConfig, model: ModelFacts) -> int:
    """Free bytes where the run will write; refuses a disk that its checkpoints would fill."""
    folder = Path(config.run_dir)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise ConfigError(f"run_dir={config.run_dir}: {folder} is a file; name a folder")
    free = shutil.disk_usage(folder).free
    checkpoint = (model.num_parameters or 0) * CHECKPOINT_BYTES_PER_PARAMETER
    needed = SPACE_BYTES + checkpoint * (config.learner.keep_checkpoints + 1)
    if free < needed:
        raise ConfigError(
            f"run_dir={config.run_dir} has {free / GIB:.1f} GiB free, but the run needs {needed / GIB:.1f} GiB "
            f"(learner.keep_checkpoints={config.learner.keep_checkpoints} and one being written, about "
            f"{checkpoint / GIB:.1f} GiB each); free some space, or set run_dir to another disk"
        )
    return free
