"""Secrets are refused as settings, and reach nothing that a run leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from r2vpo import cli
from r2vpo.job import secrets, wandb_mirror
from r2vpo.job.config import load_config, to_yaml
from r2vpo.job.tracking import Tracker
from tests.bad_input.place import Row, ids, overrides, recipe

WANDB = "0123456789abcdef0123456789abcdef01234567"
HF = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz012345"
PLANTED = {
    "WANDB_API_KEY": WANDB,
    "HF_TOKEN": HF,
    "RAY_AUTH_TOKEN": "planted-ray-token-0123456789",
    "JUDGE_API_KEY": "planted-judge-key-0123456789",
    "DB_PASSWORD": "planted password 0123456789",
}
MODEL = "model: {path: MODEL}\n"

ROWS = [
    Row("W&B key as its own setting", recipe(f"tracking: {{wandb_api_key: {WANDB}}}\n" + MODEL), "set WANDB_API_KEY"),
    Row("W&B key as mode", recipe(f"tracking: {{wandb: {WANDB}}}\n" + MODEL), "tracking.wandb holds what looks like a"),
    Row("W&B key as project", overrides(f"tracking.project={WANDB}"), "tracking.project holds what looks"),
    Row("hub token by a key", overrides(f"model.hf_token={HF}"), "model.hf_token is not a setting; secrets belong"),
    Row("hub token as model", overrides(f"model.path={HF}"), "model.path holds what looks like a secret"),
    Row(
        "hub token in options",
        overrides(f"task.options.judge={HF}"),
        "task.options.judge holds what looks",
    ),
    Row("password in an address", overrides("ray.address=http://me:planted@host:6379"), "ray.address holds what looks"),
    Row("option on the command line", overrides(f"--wandb-api-key={WANDB}"), "unknown option --wandb-api-key"),
]


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_a_secret_is_refused_as_a_setting_and_not_repeated(row, refused):
    message = refused(row)
    for secret in (WANDB, HF, "planted"):
        assert secret not in message


def test_the_value_of_a_variable_is_no_setting_whatever_its_form(refused, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    written = f"task.prompt_template={{prompt}} {PLANTED['JUDGE_API_KEY']}"
    for text in (written, "tracking.project=${oc.env:DB_PASSWORD}"):
        message = refused(Row("", overrides(text), "the value of the environment variable"))
        assert not [value for value in PLANTED.values() if value in message]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", WANDB),  # a commit of git
        ("model.path", f"/hub/models--org--name/snapshots/{WANDB}"),
        ("task.reward", "judge:score"),
        ("task.prompt_template", "Guess the secret key: {prompt}"),
        ("ray.address", "10.0.0.1:6379"),
    ],
)
def test_what_only_looks_like_one_is_a_setting(key, value):
    assert secrets.problem(key, value) is None


class FakeDriver:
    """Does what the real one does to the run's folder, without an engine: metrics, a log, an error, a summary."""

    def run_job(self, config, run, *, resume):
        tracker = Tracker(config, run, note=lambda sentence: None)
        tracker.step({"step": 0, "step/loss": 0.5})
        tracker.close()
        print(to_yaml(config), file=(run.logs / "driver.log").open("w"))
        run.write_summary({"status": "finished", "config": asdict(config)})
        return 0


def files_with(secret: str, folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


def test_nothing_that_a_run_leaves_or_prints_holds_a_secret(place, monkeypatch, capfd):
    """W&B, offline, keeps what it would have sent in the run's folder, so that is looked through, too."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "r2vpo.job.driver", SimpleNamespace(run_job=FakeDriver().run_job))
    monkeypatch.setattr(cli, "check_stack", lambda: ())
    config = str(place.recipe)
    assert cli.main(["train", config, "tracking.wandb=offline"]) == 0
    assert cli.main(["train", config, "--resume", "tracking.wandb=off", "learner.steps=7"]) == 0
    assert cli.main(["config", config]) == 0
    cli.main(["plan", config])
    run = place.runs / "toy"
    assert {"config.yaml", "history.jsonl", "metrics.jsonl", "summary.json"} <= {file.name for file in run.iterdir()}
    printed = "".join(capfd.readouterr())
    for name, value in PLANTED.items():
        assert files_with(value, run) == [], name
        assert value not in printed, name


def test_a_planted_secret_would_be_found(place):
    (place.root / "log").write_text(f"key={WANDB}\n")
    assert files_with(WANDB, place.root) == [place.root / "log"]


def test_wandb_is_given_the_settings_and_nothing_else(place, monkeypatch):
    given = {}
    fake = SimpleNamespace(init=lambda **arguments: given.update(arguments), Settings=lambda **settings: settings)
    (place.root / "config.yaml").write_text(to_yaml(load_config(place.recipe)))
    wandb_mirror._init(fake, place.root, "offline")
    assert given["config"] == asdict(load_config(place.recipe))
    assert given["settings"]["disable_code"] is True
    assert given["settings"]["console"] == "off"


def test_a_reward_cannot_give_work_to_the_ray_cluster(place):
    code = "import os; print([name for name in os.environ if 'RAY_AUTH_TOKEN' in name], os.environ['JUDGE_API_KEY'])"
    script = (
        "import subprocess, sys\nfrom rollout.rewards import _environment\n"
        f"subprocess.run([sys.executable, '-c', {code!r}], env=_environment(), check=True)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **PLANTED}, capture_output=True, text=True
    )
    assert ended.stdout == f"[] {PLANTED['JUDGE_API_KEY']}\n"
