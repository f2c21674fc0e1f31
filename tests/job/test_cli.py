import subprocess
import sys
from pathlib import Path

import pytest

from learner import checkpoint
from r2vpo import cli
from r2vpo.job.config import load_config
from r2vpo.job.history import read_starts
from r2vpo.job.settings import ConfigError

HEAVY = {"ray", "torch", "vllm", "transformers", "deepspeed", "wandb"}


@pytest.fixture
def refused(driver, capsys, runs):
    """Runs the CLI, which must refuse: exit code 2, one line on standard error, nothing made, the driver not called."""

    def refuse(*argv: str) -> str:
        assert cli.main(list(argv)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("r2vpo: error: ")
        assert captured.err.count("\n") == 1
        assert driver.calls == []
        assert not runs.exists()
        return captured.err

    return refuse


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["rollout.wokers=2"], ["rollout.wokers is not a setting; did you mean rollout.workers?"]),
        (["rollout.workers=two"], ["rollout.workers=two must be an integer"]),
        (["model.path=missing-model"], ["model.path=missing-model does not exist"]),
        (["task.name=dataset"], ["task.name=dataset needs task.path"]),
        (["task.name=dataset", "task.path=missing.jsonl"], ["missing.jsonl"]),
        (["task.reward=nowhere:score"], ["nowhere"]),
        (["rollout.top_p=0.9"], ["rollout.top_p=0.9", "rollout.temperature"]),
        (["rollout.group_size=1"], ["rollout.group_size=1", "2 or more"]),
        (["learner.minibatches=17"], ["learner.minibatches=17", "learner.groups_per_step=16"]),
        (["rollout.max_model_len=65"], ["rollout.max_model_len=65 exceeds the 64 positions"]),
        (["--resume"], ["there is no run", "start it without --resume"]),
        (["--allow-change", "learner.lr"], ["--allow-change learner.lr goes with --resume"]),
        (["--resume", "--next-free"], ["--next-free", "not allowed with", "--resume"]),
        (["--lr=3"], ["unknown option --lr (settings", "key=value"]),
        (["steps"], ["steps is not an override"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_sentence_and_nothing_is_made(refused, recipe, arguments, parts):
    message = refused("train", str(recipe), *arguments)
    for part in parts:
        assert part in message


def test_a_missing_or_broken_config_file_is_named(refused, recipe):
    assert "there is no config file none.yaml" in refused("train", "none.yaml")
    recipe.write_text("rollout:\n  workers: [1\n")
    assert f"{recipe}:3: not valid YAML" in refused("train", str(recipe))


def test_commands_must_be_known(refused):
    assert "COMMAND" in refused()
    assert "invalid choice: 'trian'" in refused("trian", "x.yaml")
    assert "CONFIG.yaml" in refused("train")


def test_training_takes_the_folder_writes_the_settings_and_calls_the_driver(driver, recipe, runs, capsys):
    driver.exit_code = 7
    assert cli.main(["train", str(recipe), "learner.steps=5", "name=mine"]) == 7
    [(config, run, resume)] = driver.calls
    assert (config.name, config.learner.steps, resume) == ("mine", 5, False)
    assert run.path == runs / "mine"
    assert load_config(run.config) == config
    assert capsys.readouterr().err == ""


def test_an_occupied_name_is_refused_and_left_alone(driver, recipe, runs, capsys):
    cli.main(["train", str(recipe)])
    before = {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()}
    assert cli.main(["train", str(recipe), "learner.steps=5"]) == 2
    message = capsys.readouterr().err
    assert "name=toy is occupied" in message
    assert "--resume" in message
    assert "name=…" in message
    assert {file: file.read_bytes() for file in runs.rglob("*") if file.is_file()} == before
    assert len(driver.calls) == 1


def test_resume_goes_on_with_changed_settings_but_not_as_another_run(driver, recipe, runs, capsys):
    cli.main(["train", str(recipe)])
    assert cli.main(["train", str(recipe), "--resume", "learner.steps=500"]) == 0
    config, run, resume = driver.calls[-1]
    assert (config.learner.steps, resume) == (500, True)
    assert load_config(run.config).learner.steps == 500
    assert cli.main(["train", str(run.config), "--resume", "seed=3"]) == 2
    assert "--resume: seed=3 (was 0), but the order of prompts" in capsys.readouterr().err
    assert load_config(run.config).seed == 0
    assert len(driver.calls) == 2


def test_a_change_of_what_the_run_means_is_taken_once_it_is_allowed_by_name(driver, recipe, runs, capsys):
    cli.main(["train", str(recipe)])
    change = ["learner.lr=1e-5", "rollout.temperature=0.5"]
    assert cli.main(["train", str(recipe), "--resume", *change]) == 2
    refusal = capsys.readouterr().err
    assert "learner.lr=1e-05 (was 1e-06)" in refusal
    flags = refusal.rpartition("add ")[2].split()
    assert flags == ["--allow-change", "rollout.temperature", "--allow-change", "learner.lr"]
    assert cli.main(["train", str(recipe), "--resume", *change, *flags]) == 0
    assert "note: changed from here on: rollout.temperature=0.5 (was 1.0), learner.lr=1e-05 (was 1e-06)" in (
        capsys.readouterr().err
    )
    config, run, _ = driver.calls[-1]
    assert config.learner.lr == 1e-5
    assert [dict(start.changes) for start in read_starts(run)] == [
        {},
        {"rollout.temperature": [1.0, 0.5], "learner.lr": [1e-6, 1e-5]},
    ]
    assert cli.main(["train", str(run.config), "--resume"]) == 0, "what was allowed once is the run's setting now"


def test_a_damaged_checkpoint_is_named_before_anything_starts(driver, recipe, runs, capsys):
    cli.main(["train", str(recipe)])
    checkpoints = runs / "toy" / "checkpoints"
    for step in (4, 8):
        checkpoint.begin(checkpoints, step)
        checkpoint.commit(checkpoints, step, {"version": step})
    (checkpoints / "step-000008" / "trainer.json").write_text("{")
    assert cli.main(["train", str(recipe), "--resume"]) == 2
    message = capsys.readouterr().err
    assert "step-000008/trainer.json is damaged (1 bytes instead of 17)" in message
    assert "to go on from step-000004" in message
    assert len(driver.calls) == 1
    assert [start.step for start in read_starts(driver.calls[0][1])] == [0]


def test_next_free_counts_up_and_says_so(driver, recipe, runs, capsys):
    for number in (1, 2):
        assert cli.main(["train", str(recipe), "--next-free"]) == 0
        assert f"run toy-{number} " in capsys.readouterr().out
        assert driver.calls[-1][0].name == f"toy-{number}"
    assert sorted(entry.name for entry in runs.iterdir()) == ["toy-1", "toy-2"]


def test_overrides_may_stand_on_both_sides_of_an_option(driver, recipe):
    assert cli.main(["train", str(recipe), "seed=1", "--next-free", "learner.steps=3"]) == 0
    config = driver.calls[-1][0]
    assert (config.seed, config.learner.steps) == (1, 3)


def test_notes_are_said_before_the_start(driver, recipe, capsys):
    cli.main(["train", str(recipe), "learner.minibatches=1"])
    assert "note: learner.minibatches=1: V is always 0" in capsys.readouterr().err


def test_a_refusal_of_the_driver_has_the_same_form(driver, recipe, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise ConfigError("the job needs 3 GPUs and the cluster has 2")

    monkeypatch.setattr(sys.modules["r2vpo.job.driver"], "run_job", refuse)
    assert cli.main(["train", str(recipe)]) == 2
    assert capsys.readouterr().err == "r2vpo: error: the job needs 3 GPUs and the cluster has 2\n"


def test_config_prints_every_setting_and_reads_back(recipe, capsys, tmp_path):
    assert cli.main(["config", str(recipe), "learner.lr=2e-5"]) == 0
    printed = tmp_path / "configs" / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(recipe, ["learner.lr=2e-5"])


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["config", "--help"], ["--version"]])
def test_help_ends_well(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 0
    assert "r2vpo" in capsys.readouterr().out


def test_bad_input_is_refused_by_the_real_command_without_a_heavy_import(recipe: Path, runs: Path):
    code = "import sys\nfrom r2vpo.cli import main\ncode = main(sys.argv[1:])\nprint(*sys.modules)\nsys.exit(code)"
    argv = ["train", str(recipe), "model.path=/no/such/model"]
    ended = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("r2vpo: error: model.path=/no/such/model does not exist; name a model directory")
    assert not HEAVY & set(ended.stdout.split())
    assert not runs.exists()


def test_every_check_of_a_sound_run_is_light_too(recipe: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom r2vpo.job.config import load_config\n"
        "from r2vpo.job.preflight import preflight\nfrom r2vpo.job.versions import _problem\nimport r2vpo.cli\n"
        "preflight(load_config(Path(sys.argv[1]))); _problem()\nprint(*sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(recipe)], capture_output=True, text=True, check=True)
    assert not HEAVY & set(ended.stdout.split())


def test_python_dash_m_is_the_same_command():
    ended = subprocess.run([sys.executable, "-m", "r2vpo", "train", "none.yaml"], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, "r2vpo: error: there is no config file none.yaml\n")
