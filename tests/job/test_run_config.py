import ast
import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from r2vpo.job.config import ConfigError, ModelConfig, RunConfig, load_config, to_yaml
from r2vpo.job.settings import leaves


@pytest.fixture
def load(tmp_path: Path):
    """Loads YAML text with overrides; `model.path` is given unless the text gives it."""
    file = tmp_path / "configs" / "a.yaml"
    file.parent.mkdir()

    def load_text(text: str = "", *overrides: str) -> RunConfig:
        file.write_text(text if "model" in text else f"{text}\nmodel: {{path: m}}\n")
        return load_config(file, overrides)

    return load_text


def test_overrides_win_over_the_file_and_the_last_over_the_first(load):
    config = load("learner:\n  steps: 5\n  lr: 1e-5\n", "learner.steps=6", "learner.steps=7")
    assert config.learner.steps == 7
    assert config.learner.lr == 1e-5
    assert config.learner.groups_per_step == 32


@pytest.mark.parametrize(
    ("yaml_text", "override", "key", "value"),
    [
        ("tracking: {wandb: off}", "", "tracking.wandb", "off"),
        ("", "tracking.wandb=off", "tracking.wandb", "off"),
        ("name: 007", "", "name", "007"),
        ("name: 1e3", "", "name", "1e3"),
        ("", "name=1_000", "name", "1_000"),
        ("", "task.prompt_template={prompt} = ", "task.prompt_template", "{prompt} = "),
        ("", "task.prompt_template=Q: {prompt}", "task.prompt_template", "Q: {prompt}"),
        ("", "task.reward=null", "task.reward", None),
        ("learner: {lr: 1e-6}", "", "learner.lr", 1e-6),
        ("", "learner.lr=2", "learner.lr", 2.0),
        ("", "rollout.kv_cache_gb=null", "rollout.kv_cache_gb", None),
        ("", "algorithm.step_control=false", "algorithm.step_control", False),
        ("", "task.options.digits=3", "task.options", {"digits": 3}),
        ("", "task.options.a.b=[1, x]", "task.options", {"a": {"b": [1, "x"]}}),
        ("task: {options: {a: off, b: 1e-3}}", "", "task.options", {"a": "off", "b": 1e-3}),
        ("task: {options: {a: 1, b: 2}}", "task.options.b=3", "task.options", {"a": 1, "b": 3}),
        ("task: {options: {a: 1, b: 2}}", "task.options={c: 3}", "task.options", {"c": 3}),
        ("task: {options: {a: 1, b: 2}}", "task.options={}", "task.options", {}),
        ("rollout:\n", "", "rollout.workers", 1),
        ("seed: ${learner.steps}", "learner.steps=9", "seed", 9),
    ],
)
def test_values_arrive_as_written(load, yaml_text, override, key, value):
    config = load(yaml_text, *([override] if override else []))
    assert dict(leaves(config))[key] == value


@pytest.mark.parametrize(
    ("yaml_text", "overrides", "parts"),
    [
        ("rollout:\n  wokers: 2", (), ["a.yaml:2: rollout.wokers is not a setting; did you mean rollout.workers?"]),
        ("", ("rollout.wokers=2",), ["command line: rollout.wokers", "did you mean rollout.workers?"]),
        ("", ("workers=2",), ["workers is not a setting; did you mean rollout.workers?"]),
        ("", ("learner.learning_rate=1",), ["learner.learning_rate is not a setting; learner holds ranks, steps"]),
        ("", ("zzz=1",), ["zzz is not a setting; the top level holds name, seed, run_dir, model"]),
        ("", ("rollout.workers.x=1",), ["rollout.workers.x is not a setting"]),
        ("rollout:\n  workers: two", (), ["a.yaml:2: rollout.workers=two must be an integer"]),
        ("rollout:\n  workers: 1.5", (), ["rollout.workers=1.5 must be an integer"]),
        ("", ("rollout.workers=true",), ["command line: rollout.workers=true must be an integer"]),
        ("", ("rollout.workers=",), ["rollout.workers must be an integer"]),
        ("", ("rollout.temperature=hot",), ["rollout.temperature=hot must be a number"]),
        ("", ("rollout.kv_cache_gb=x",), ["rollout.kv_cache_gb=x must be a number or null"]),
        ("", ("algorithm.step_control=perhaps",), ["algorithm.step_control=perhaps must be true, false or null"]),
        ("", ("task.options=3",), ["task.options=3 must be a mapping"]),
        ("", ("rollout=3",), ["rollout=3 must be a mapping of settings", "workers"]),
        ("rollout: [1]", (), ["a.yaml:1: rollout must be a mapping of settings"]),
        ("", ("rollout.workers",), ["rollout.workers is not an override; write key=value"]),
        ("", ("=3",), ["=3 has no valid key"]),
        ("", ("rollout.workers=[1",), ["rollout.workers=[1 is not a YAML value"]),
        ("seed: 1\nseed: 2", (), ["a.yaml:2: seed is given twice"]),
        ("name: a\n bad: b: c", (), ["a.yaml:2: not valid YAML"]),
        ("- model", (), ["a.yaml:1: the file must be a mapping of settings"]),
        ("model:", (), ["model.path is required and has no default"]),
        ("model: {path: ''}", (), ["model.path is empty"]),
        (
            "name: !!python/object/apply:os.getcwd []",
            (),
            ["a.yaml:1: not valid YAML: could not determine a constructor"],
        ),
        ("seed: ${learner.stepz}", (), ["a.yaml:1: seed", "learner.stepz"]),
        ("", ("learner.lr=.inf",), ["learner.lr=inf must be a finite number"]),
        ("", ("name=a/b",), ["name=a/b cannot name a folder"]),
        ("", ("name=..",), ["name=.. cannot name a folder"]),
        ("", ("seed=-1",), ["seed=-1 must lie between 0 and"]),
        ("", ("tracking.wandb=of",), ["tracking.wandb=of is not one of auto, online, offline, off; did you mean off?"]),
        ("", ("rollout.top_p=0.9",), ["rollout.top_p=0.9", "use rollout.temperature"]),
        ("", ("rollout.group_size=1",), ["rollout.group_size=1", "set rollout.group_size to 2 or more"]),
        (
            "",
            ("replay.min_verdicts=5", "rollout.group_size=4"),
            [
                "replay.min_verdicts=5 exceeds rollout.group_size=4",
                "lower min_verdicts to 4 or less, or raise group_size",
            ],
        ),
        ("", ("algorithm.name=m2po",), ["algorithm.name=m2po masks", "a whole minibatch", "choose another objective"]),
        ("", ("learner.minibatches=33",), ["learner.minibatches=33", "learner.groups_per_step=32"]),
        (
            "",
            ("learner.minibatches=17",),  # 32 groups, half of them stale: 16 fresh
            ["learner.minibatches=17 exceeds the 16 fresh groups", "replay.stale_fraction=0.5", "lower minibatches"],
        ),
        (
            "",
            ("learner.minibatches=1", "algorithm.step_control=true"),
            ["algorithm.step_control=true", "learner.minibatches=1", "step_control=null"],
        ),
        ("", ("learner.sync_every=0",), ["learner.sync_every=0"]),
        (
            "",
            ("learner.sync_every=4", "replay.max_lag=2"),
            ["learner.sync_every=4 exceeds replay.max_lag=2 + 1", "wait for each other", "raise max_lag to 3"],
        ),
        (
            "",
            ("task.eval_every=3", "learner.sync_every=2"),
            ["task.eval_every=3 is no multiple of learner.sync_every=2"],
        ),
        ("", ("rollout.pools={a: {workers: 2}}",), ["rollout.workers=1 is not the sum of rollout.pools, which have 2"]),
        (
            "",
            ("rollout.pools={a: {num_gpus: 1}}",),
            ["rollout.pools.a must be a mapping of workers and any of num_cpus"],
        ),
        ("", ("rollout.pools={a: {workers: 1, spots: true}}",), ["rollout.pools.a must be a mapping", "'spots': True"]),
        ("", ("rollout.pools={a: {workers: 1, spot: 1}}",), ["rollout.pools.a.spot=1 is of another type"]),
        ("", ("rollout.pools={a: {workers: 0}}",), ["rollout.pools.a: rollout.workers=0 must be at least 1"]),
        ("", ("rollout.pools={a b: {workers: 1}}",), ["rollout.pools.a b: a pool's name has letters"]),
        ("", ("rollout.labels={market: spot}",), ["rollout.labels ask Ray for nodes with market", "a private Ray"]),
        (
            "",
            ("learner.weight_transport=nccl", "rollout.num_gpus=0"),
            ["nccl broadcasts from GPU to GPU", "not rollout.num_gpus=0", "weight_transport=object_store"],
        ),
        (
            "",
            ("learner.weight_transport=nccl", "learner.num_gpus=0.5"),
            ["needs one of its own, not learner.num_gpus=0.5"],
        ),
        (
            "",
            ("learner.weight_transport=nccl", "rollout.autoscale.max=2"),
            ["rollout.autoscale.max=2 adds and drains workers", "`r2vpo resume`", "set it to object_store"],
        ),
        ("", ("learner.weight_transport=ncc",), ["learner.weight_transport=ncc is not one of object_store, nccl"]),
        (
            "",
            ("rollout.resources={rollout: 1}",),
            ["ask Ray for rollout", "a private Ray has only CPUs and GPUs", "ray.address"],
        ),
        ("", ("rollout.resources={rollout: much}",), ["rollout.resources.rollout", "'much'"]),
        ("", ("ray.address=auto", "ray.num_cpus=4"), ["ray.num_cpus=4", "ray.address=auto", "remove one"]),
        ("", ("ray.num_cpus=2", "rollout.workers=2"), ["ray.num_cpus=2 is less than the 3 CPUs", "rollout.workers=2"]),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(load, yaml_text, overrides, parts):
    with pytest.raises(ConfigError) as caught:
        load(yaml_text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_config_file_that_cannot_be_read_is_named(tmp_path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"name: \xff")
    for path, part in [
        (tmp_path / "none.yaml", "there is no config file"),
        (tmp_path, "is a directory"),
        (binary, "is not UTF-8 text"),
        (tmp_path / "name=x", "is an override; the config file comes first"),
    ]:
        with pytest.raises(ConfigError, match=part) as caught:
            load_config(path)
        assert str(path) in str(caught.value)


def test_the_resolved_settings_read_back_as_they_are(load, tmp_path):
    config = load(
        "learner: {lr: 3e-7}\nname: '1e3'\ntask: {prompt_template: 'a \\${b} {prompt}', options: {x: 'off', y: '1'}}",
        "tracking.wandb=off",
    )
    assert config.task.prompt_template == "a ${b} {prompt}"
    written = tmp_path / "configs" / "resolved.yaml"
    written.write_text(to_yaml(config))
    assert load_config(written) == config


def test_paths_are_found_from_here_and_then_from_above_the_config_file(load, tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "data.jsonl").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = load("task: {name: dataset, path: data.jsonl, eval_path: missing.jsonl}")
    assert config.model.path == str(tmp_path / "m")
    assert config.task.path == str(tmp_path / "data.jsonl")
    assert config.task.eval_path == "missing.jsonl"
    assert config.run_dir == str(elsewhere / "runs")
    (elsewhere / "m").mkdir()
    assert load().model.path == str(elsewhere / "m")


def test_paths_of_further_sets_are_found_like_the_others(load, tmp_path):
    (tmp_path / "amc.jsonl").touch()
    sets = "{amc: amc.jsonl, aime: {path: org/aime, split: test}, again: {path: amc.jsonl}}"
    config = load(f"task: {{name: dataset, path: org/name, eval_sets: {sets}}}")
    here = str(tmp_path / "amc.jsonl")
    assert config.task.eval_sets == {
        "amc": here,
        "aime": {"path": "org/aime", "split": "test"},
        "again": {"path": here},
    }


def test_settings_that_do_less_than_one_thinks_are_noted(load):
    # 16 fresh groups a step and max_lag 2: at most 48 groups under way, 1 × 8 slots
    assert load().notes == ()
    [plain] = load("", "learner.minibatches=1").notes
    assert "plain policy gradient" in plain
    [control] = load("", "learner.lr=0").notes
    assert control == "learner.lr=0: a control run, in which neither weights nor budget move"
    [none_stale] = load("", "learner.groups_per_step=4", "replay.stale_fraction=0.1").notes
    assert "rounds to no stale group" in none_stale
    [idle] = load("", "rollout.groups_in_flight=20", "replay.max_lag=0").notes
    assert "= 20 groups, but 16 fresh groups" in idle
    assert "at most 16" in idle


def config_classes(root: type = RunConfig) -> list[type]:
    nested = [hint for hint in get_type_hints(root).values() if is_dataclass(hint)]
    return [root, *(found for hint in nested for found in config_classes(hint))]


@pytest.mark.parametrize("section", config_classes(), ids=lambda section: section.__name__)
def test_every_setting_has_a_sentence_under_it(section):
    [tree] = ast.parse(inspect.getsource(section)).body
    assert isinstance(tree, ast.ClassDef)
    documented = {
        statement.target.id
        for statement, below in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and str(below.value.value).endswith((".", ":"))
    }
    assert documented == {item.name for item in fields(section)}


def test_a_config_can_be_made_without_a_file():
    config = RunConfig(model=ModelConfig(path="x"))
    assert (config.num_fresh, config.num_stale, config.reserved_cpus) == (16, 16, 2.0)
