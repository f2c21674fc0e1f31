import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from r2vpo.job import preflight as module
from r2vpo.job.config import ConfigError, RunConfig, load_config
from r2vpo.job.preflight import preflight, read_model


@pytest.fixture
def config(recipe: Path) -> RunConfig:
    return load_config(recipe)


def with_model(config: RunConfig, path: str | Path) -> RunConfig:
    return replace(config, model=replace(config.model, path=str(path)))


def test_a_sound_run_passes_and_its_facts_are_known(config, model_dir):
    facts = preflight(config)
    assert facts.model.directory == model_dir
    assert facts.model.architecture == "Qwen2ForCausalLM"
    assert facts.model.num_parameters == 6  # one tensor of 2 × 3
    assert facts.model.max_positions == 64
    assert facts.num_prompts > 0
    assert facts.num_eval_prompts > 0
    assert not Path(config.run_dir).exists()


def test_weights_in_several_files_are_counted_and_must_all_be_there(model_dir):
    (model_dir / "model.safetensors").unlink()
    for number in (1, 2):
        save_file({f"w{number}": np.zeros(10, np.float32)}, model_dir / f"model-{number}.safetensors")
    index = {"weight_map": {"w1": "model-1.safetensors", "w2": "model-2.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model(model_dir).num_parameters == 20
    (model_dir / "model-2.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"lacks model-2\.safetensors"):
        read_model(model_dir)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def only_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def half_a_file(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")


def too_short(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 32}))


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (no_config, ["has no config.json"]),
        (broken_config, ["config.json is not valid JSON"]),
        (only_pickled_weights, ["pytorch_model.bin", "pickled weights can run code", "save_pretrained"]),
        (no_weights, ["has no *.safetensors"]),
        (no_tokenizer, ["has no tokenizer"]),
        (half_a_file, ["model.safetensors is not a complete safetensors file"]),
        (git_lfs_pointer, ["model.safetensors is not a complete safetensors file", "git-lfs"]),
        (too_short, ["rollout.max_model_len=64 exceeds the 32 positions", "set rollout.max_model_len to 32 or less"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_model_that_cannot_be_trained_is_refused_with_the_reason(config, model_dir, damage, parts):
    damage(model_dir)
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    for part in [*parts, str(model_dir)]:
        assert part in str(caught.value)


def test_rope_scaling_stretches_the_positions(model_dir):
    scaled = {"max_position_embeddings": 32, "rope_scaling": {"factor": 4.0, "rope_type": "yarn"}}
    (model_dir / "config.json").write_text(json.dumps(scaled))
    assert read_model(model_dir).max_positions == 128


def test_a_missing_model_is_named_with_both_ways_to_read_it(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model_id, file: None)

    def unreachable(self, model_id, timeout):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(ConfigError) as caught:
        preflight(with_model(config, "no-such-org/model"))
    for part in ("no-such-org/model is no local directory", str(tmp_path), "hub", "Name or service not known"):
        assert part in str(caught.value)


@pytest.mark.parametrize("path", ["/no/such/model", "./model-x", "model-x", "configs/model-x"])
def test_a_path_that_cannot_be_a_hub_id_never_asks_the_hub(config, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)  # holds configs/, so that configs/model-x is a local path that is missing
    monkeypatch.setattr(module, "_find_on_hub", lambda model_id: pytest.fail("asked the hub"))
    with pytest.raises(ConfigError, match="does not exist; name a model directory"):
        preflight(with_model(config, path))


def test_a_model_in_the_cache_of_the_hub_is_checked_like_a_directory(config, model_dir, monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model_id, file: str(model_dir / "config.json"))
    assert preflight(with_model(config, "org/model")).model.num_parameters == 6


def test_a_model_on_the_hub_needs_safetensors(config, monkeypatch):
    files = [SimpleNamespace(rfilename="pytorch_model.bin")]
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda model_id, file: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: SimpleNamespace(siblings=files))
    with pytest.raises(ConfigError, match=r"has no \*\.safetensors"):
        preflight(with_model(config, "org/model"))
    files.append(SimpleNamespace(rfilename="model.safetensors"))
    assert preflight(with_model(config, "org/model")).model.directory is None


def test_a_chat_task_needs_a_chat_template(config, model_dir):
    chat = replace(config, task=replace(config.task, chat=True))
    with pytest.raises(ConfigError, match=r"no chat template; set task\.chat=false"):
        preflight(chat)
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    preflight(chat)


def test_a_disk_that_the_checkpoints_would_fill_is_refused(config, monkeypatch):
    # 10^9 parameters: 14 GB a checkpoint, two are kept while a third is written: 42 GB and 1 GiB beside them
    monkeypatch.setattr(module, "_count_parameters", lambda file: 10**9)
    needed = 3 * 14 * 10**9 + 2**30
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(ConfigError, match=r"run needs 40\.1 GiB.*learner\.keep_checkpoints=2.*13\.0 GiB each"):
        preflight(config)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert preflight(config).free_bytes == needed


def test_a_dataset_is_read_before_anything_starts(config, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1", "answer": "2"}\n{"prompt": "1+2"}\n')
    task = replace(config.task, name="dataset", path=str(rows), eval_prompts=1)
    with pytest.raises(ConfigError) as caught:
        preflight(replace(config, task=task))
    for part in (f"{rows}", "2", "answer"):
        assert part in str(caught.value)
