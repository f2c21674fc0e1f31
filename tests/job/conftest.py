import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from r2vpo import cli
from r2vpo.job.config import ModelConfig, RunConfig


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """The files of a model, as far as the front door looks at them: 6 parameters, 64 positions."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({"weight": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, model_dir: Path) -> Path:
    """A config file that passes every check."""
    file = tmp_path / "configs" / "toy.yaml"
    file.parent.mkdir()
    file.write_text(
        f"name: toy\nrun_dir: {tmp_path / 'runs'}\nmodel:\n  path: {model_dir}\n"
        "rollout:\n  max_tokens: 8\n  max_model_len: 64\nlearner:\n  groups_per_step: 16\ntracking:\n  wandb: off\n"
    )
    return file


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


class FakeDriver:
    """Stands where the real driver would bring Ray in."""

    def __init__(self) -> None:
        self.calls: list[tuple[RunConfig, Any, bool]] = []
        self.exit_code = 0

    def run_job(self, config: RunConfig, run: Any, *, resume: bool) -> int:
        self.calls.append((config, run, resume))
        return self.exit_code


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    module = ModuleType("r2vpo.job.driver")
    module.run_job = fake.run_job  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "r2vpo.job.driver", module)
    monkeypatch.setattr(cli, "check_stack", lambda: ())
    return fake


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(name="toy", model=ModelConfig(path="model"))
