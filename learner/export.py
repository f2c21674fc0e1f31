"""The trained model as a directory in Hugging Face format: config, tokenizer, safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from learner.engine import LearnerEngine, copied
from learner.publish import bucket_names


def export_model(engine: LearnerEngine, *, model_path: str, directory: Path, bucket_mb: float) -> None:
    """Write the engine's weights to ``directory``, with the config and the tokenizer of ``model_path``.

    Collective: all ranks gather, bucket by bucket, and rank 0 writes each as one file. The directory appears under its
    name only when it is complete. A model that is already there is replaced by it; ``ValueError`` if it is something
    else.
    """
    if directory.exists() and not (directory / "config.json").is_file():
        raise ValueError(f"{directory} exists and is no model; choose another directory or remove it")
    written = directory.with_name(directory.name + ".tmp")
    if engine.rank == 0:
        shutil.rmtree(written, ignore_errors=True)
        written.mkdir(parents=True)
    engine.barrier()
    buckets = bucket_names(engine.tensors, bucket_mb=bucket_mb)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(buckets, start=1):
        tensors = engine.gather(names, copied)
        if tensors is not None:
            file_name = _file_name(number, len(buckets))
            save_file(tensors, written / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file_name)
    if engine.rank == 0:
        if len(buckets) > 1:
            index = {"metadata": {"total_size": _total_size(written)}, "weight_map": weight_map}
            (written / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        _write_companions(model_path, written, engine.dtype)
        _put_in_place(written, directory)
    engine.barrier()


def _put_in_place(written: Path, directory: Path) -> None:
    """Give ``written`` its name; what had it before goes."""
    replaced = directory.with_name(directory.name + ".replaced.tmp")
    shutil.rmtree(replaced, ignore_errors=True)
    if directory.exists():
        directory.rename(replaced)
    written.rename(directory)
    shutil.rmtree(replaced, ignore_errors=True)


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _total_size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def _write_companions(model_path: str, directory: Path, dtype: str) -> None:
    """Config, generation config and tokenizer. Read afresh: the engine switches dropout off in its own config."""
    local = Path(model_path).is_dir()
    config = AutoConfig.from_pretrained(model_path, local_files_only=local, trust_remote_code=False)
    config.dtype = dtype
    config.save_pretrained(directory)
    if not local or Path(model_path, "generation_config.json").is_file():
        GenerationConfig.from_pretrained(model_path, local_files_only=local).save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=local, trust_remote_code=False)
    tokenizer.save_pretrained(directory)
