from pathlib import Path

import pytest

from r2vpo.job.config import load_config
from r2vpo.job.preflight import read_model

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_is_named_after_its_file(path):
    config = load_config(path)
    assert config.name == path.stem
    assert config.notes == ()


def test_the_quickstart_finds_its_model_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(CONFIGS / "quickstart.yaml")
    facts = read_model(Path(config.model.path))
    assert facts.max_positions is not None
    assert facts.max_positions >= config.rollout.max_model_len
