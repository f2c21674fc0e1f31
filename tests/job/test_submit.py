import json
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from types import SimpleNamespace

import pytest

from r2vpo import cli
from r2vpo.job import arrive, job_server, seal, shipment
from r2vpo.job.config import ConfigError, load_config
from r2vpo.job.job_server import JobServer, own_output
from r2vpo.job.shipment import gather, ship_code, ship_inputs
from r2vpo.job.submit import cluster_config
from tests.job.fake_cluster import FakeCluster

ADDRESS = "http://head:8265"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    home = tmp_path / "head"
    home.mkdir()
    fake = FakeCluster(home)
    monkeypatch.setattr(job_server, "_connect", lambda url: fake)
    return fake


@pytest.fixture
def said(capsys):
    def run_command(*argv):
        code = cli.main([*argv, "--address", ADDRESS])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run_command


# The code


def test_shipped_code_is_an_installed_distribution_to_a_python_that_has_no_other(tmp_path):
    shipped = ship_code(tmp_path / "ship")
    assert [path.name for path in shipped[:-1]] == ["r2vpo", "rollout", "learner", "replay"]
    assert not list((tmp_path / "ship").glob("**/__pycache__"))
    paths = []
    for number, path in enumerate(shipped):  # as Ray does: every folder below one of its own
        paths.append(tmp_path / str(number))
        paths[-1].mkdir()
        path.rename(paths[-1] / path.name)
    code = (
        "from importlib import metadata\nimport r2vpo\n"
        "print(metadata.version('r2vpo'), r2vpo.__file__)\n"
        "print(*[e.value for e in metadata.entry_points(group='vllm.general_plugins')])"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        f"{metadata.version('r2vpo')} {tmp_path / '0' / 'r2vpo' / '__init__.py'}",
        "rollout.weight_transfer:register",
    ]


# The inputs


def with_data(recipe, tmp_path, monkeypatch):
    """The recipe with a dataset and a reward module of the user's."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 8)
    (tmp_path / "my_rewards.py").write_text("def score(response, truth):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    return [
        "task.name=dataset",
        f"task.path={tmp_path / 'train.jsonl'}",
        "task.reward=my_rewards:score",
        "task.eval_prompts=2",
    ]


def test_what_a_config_names_here_travels_and_the_config_follows_it(recipe, model_dir, tmp_path, monkeypatch):
    config = cluster_config(recipe, with_data(recipe, tmp_path, monkeypatch))
    home = ship_inputs(gather(config), tmp_path)
    assert sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()) == [
        "config.yaml",
        "model-path/model/config.json",
        "model-path/model/model.safetensors",
        "model-path/model/tokenizer.json",
        "my_rewards.py",
        "task-path/train.jsonl",
    ]
    monkeypatch.chdir(home)
    there = load_config(home / "config.yaml")
    assert there.model.path == str(home / "model-path" / "model")
    assert there.task.path == str(home / "task-path" / "train.jsonl")


def test_paths_that_are_the_cluster_s_and_hub_ids_stay_as_they_are(recipe, model_dir):
    config = cluster_config(recipe, [])
    assert gather(config, there=frozenset({"model.path"})).sources == {}
    hub = cluster_config(recipe, ["model.path=Qwen/Qwen3-8B"])
    assert gather(hub).config.model.path == "Qwen/Qwen3-8B"


def test_links_are_followed_and_pickled_weights_stay_behind(recipe, model_dir, tmp_path):
    (model_dir / "pytorch_model.bin").write_bytes(b"x" * 1000)
    blob = tmp_path / "blob"
    (model_dir / "tokenizer.json").rename(blob)
    (model_dir / "tokenizer.json").symlink_to(blob)
    inputs = gather(cluster_config(recipe, []))
    assert inputs.num_bytes["model.path"] == sum(
        (model_dir / name).stat().st_size for name in ("config.json", "model.safetensors", "tokenizer.json")
    )
    home = ship_inputs(inputs, tmp_path)
    copied = home / "model-path" / "model"
    assert sorted(path.name for path in copied.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not (copied / "tokenizer.json").is_symlink()


def test_more_than_a_job_can_carry_is_one_sentence_with_both_numbers(recipe, model_dir, monkeypatch):
    monkeypatch.setattr(shipment, "LIMIT_BYTES", 50)
    with pytest.raises(ConfigError, match=r"^model\.path=.* is \d+ B, and a job brings along 50 B at most; put it"):
        gather(cluster_config(recipe, []))


def test_an_incomplete_model_is_refused_here(recipe, model_dir):
    (model_dir / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        gather(cluster_config(recipe, []))


@pytest.mark.parametrize(
    ("override", "run_dir"),
    [("run_dir=/runs", "/runs"), ("run_dir=~/r", "~/r"), ("run_dir=runs", "~/r2vpo-runs"), ("seed=1", "/")],
)
def test_runs_lie_in_an_absolute_folder_of_the_head_node(recipe, override, run_dir):
    config = cluster_config(recipe, [override, "ray.num_cpus=8", "ray.object_store_mb=256"])
    assert config.run_dir.startswith(run_dir)
    assert (config.ray.address, config.ray.num_cpus, config.ray.object_store_mb) == ("auto", None, None)


# The arrival


def test_what_arrives_stays_with_the_run_and_a_taken_name_is_refused(recipe, runs, tmp_path):
    shipped = ship_inputs(gather(cluster_config(recipe, [])), tmp_path)
    home = arrive.keep(shipped)
    assert home == runs / ".inputs" / "toy"
    assert load_config(home / "config.yaml").name == "toy"
    assert (home / "model-path" / "model" / "config.json").is_file()
    assert arrive.keep(shipped) == home  # a job that failed before the run began left it
    assert [path.name for path in home.parent.iterdir()] == ["toy"]
    (runs / "toy").mkdir()
    with pytest.raises(ConfigError, match="name=toy is occupied"):
        arrive.keep(shipped)


def test_a_folder_that_cannot_be_written_is_named(recipe, tmp_path):
    (tmp_path / "file").write_text("")
    shipped = ship_inputs(gather(cluster_config(recipe, [f"run_dir={tmp_path / 'file'}"])), tmp_path)
    with pytest.raises(ConfigError, match=r"run_dir=.*file cannot be written on .*; name another folder"):
        arrive.keep(shipped)


# The command


def test_submit_says_where_the_run_is_and_what_to_do_next(cluster, recipe, said):
    cluster.runs_commands = False
    done = said("submit", str(recipe))
    assert done.code == 0
    (job,) = cluster.details
    assert done.out.splitlines()[0] == f"run toy is job {job} at {ADDRESS}"
    assert "brought along: model.path (" in done.out
    assert done.out.splitlines()[-5:] == [
        f"r2vpo {command} --address {ADDRESS}"
        for command in ("status toy", "logs toy --follow", "scale toy --rollout N", "stop toy", "resume toy")
    ]
    (submitted,) = cluster.submitted
    assert submitted["entrypoint"] == "python -m r2vpo.job.arrive"
    assert submitted["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "300"}


def test_a_head_node_that_has_just_started_is_waited_for(cluster, recipe, said, monkeypatch):
    cluster.runs_commands = False
    submit, answers = cluster.submit_job, iter([RuntimeError(f"status code 500: {job_server.NO_AGENT}, please"), None])

    def later(**settings):
        if error := next(answers):
            raise error
        return submit(**settings)

    monkeypatch.setattr(cluster, "submit_job", later)
    monkeypatch.setattr(job_server, "AGENT_PAUSE_S", 0.0)
    assert said("submit", str(recipe)).code == 0
    assert len(cluster.submitted) == 1


def test_submit_as_json(cluster, recipe, runs, said):
    cluster.runs_commands = False
    answer = json.loads(said("submit", str(recipe), "--json", "name=other").out)
    assert (answer["run"], answer["address"], answer["run_dir"]) == ("other", ADDRESS, str(runs))
    assert answer["job"] in cluster.details


def test_a_secret_travels_only_when_named_and_never_in_a_file(cluster, recipe, said, monkeypatch, tmp_path):
    cluster.runs_commands = False
    monkeypatch.setenv("WANDB_API_KEY", "sekret-42")
    said("submit", str(recipe), "name=a")
    done = said("submit", str(recipe), "name=b", "--env", "WANDB_API_KEY")
    without, sealed = (job["env_vars"] for job in cluster.submitted)
    assert sealed.keys() - without.keys() == {seal.VARIABLE}
    assert "sekret-42" not in done.out + done.err + repr(cluster.submitted)
    assert not [f for f in cluster.home.rglob("*") if f.is_file() and b"sekret-42" in f.read_bytes()]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--env", "NO_SUCH_VARIABLE"], "--env NO_SUCH_VARIABLE: it is not set here; export it first"),
        (["learner.stepz=1"], "command line: learner.stepz is not a setting; did you mean learner.steps?"),
        (["--there", "model"], "argument --there: invalid choice"),
        (["task.name=dataset", "task.path=none.jsonl"], "task.path=none.jsonl does not exist here (seen from "),
        (["model.path=./none"], "model.path=./none does not exist here (seen from "),
        (["model.path=tests/none"], "model.path=tests/none does not exist here (seen from "),
        (["model.path=/no/such"], ""),
    ],
)
def test_a_mistake_is_told_before_anything_is_submitted(cluster, recipe, said, argv, message):
    cluster.runs_commands = False
    done = said("submit", str(recipe), *argv)
    if not message:  # a path that is not here may be the cluster's
        assert done.code == 0
        return
    assert (done.code, cluster.submitted) == (2, [])
    assert done.err.startswith(f"r2vpo: error: {message}")


def test_a_name_that_a_job_has_is_refused_with_the_ways_on(cluster, recipe, said):
    cluster.runs_commands = False
    said("submit", str(recipe))
    again = said("submit", str(recipe))
    assert again.code == 2
    assert "name=toy is taken by job r2vpo-toy-" in again.err
    assert f"r2vpo resume toy --address {ADDRESS}" in again.err


def test_what_the_head_node_refuses_is_in_the_logs(cluster, recipe, said):
    """The whole way, without Ray: the driver's checks refuse the run, since its model cannot be trained."""
    (cluster.home / "blocked").write_text("")
    said("submit", str(recipe), "run_dir=~/blocked/runs")
    done = said("status", "toy")
    assert done.code == 1
    assert "toy is not running: its job r2vpo-toy-" in done.out
    assert "was refused 0:0" in done.out
    assert "r2vpo: error: run_dir=" in done.out


def test_what_is_sealed_is_opened_by_the_process_that_has_the_pad(tmp_path, monkeypatch):
    environment, folders = seal.seal({"WANDB_API_KEY": "sekret-42", "NAME": "ü"}, tmp_path)
    monkeypatch.setattr("sys.path", [str(folder.parent) for folder in folders])
    monkeypatch.setenv(seal.VARIABLE, environment[seal.VARIABLE])
    assert seal.unseal() == {"WANDB_API_KEY": "sekret-42", "NAME": "ü"}
    assert seal.VARIABLE not in os.environ
    assert seal.unseal() == {}


def test_nothing_to_seal_is_nothing_to_send(tmp_path):
    assert seal.seal({}, tmp_path) == ({}, [])
    assert list(tmp_path.iterdir()) == []


# The address


class _Answers(BaseHTTPRequestHandler):
    """A server that is none of Ray's, or one that wants a token."""

    code = 200
    body = b"<html>"

    def do_GET(self):
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, format, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(_Answers, "code", 200)
    with HTTPServer(("127.0.0.1", 0), _Answers) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{http.server_port}"
        http.shutdown()


def test_nothing_at_the_address_is_said_at_once(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match=r"nothing answers there \(.*Connection refused\); is the head node up"):
            JobServer(f"127.0.0.1:{taken.getsockname()[1]}")


@pytest.mark.parametrize("code", [200, 404])
def test_another_server_at_the_address_is_said_at_once(server, monkeypatch, code):
    monkeypatch.setattr(_Answers, "code", code)
    with pytest.raises(ConfigError, match=r"what answers there is no job server of Ray; its port is 8265 by default"):
        JobServer(server)


@pytest.mark.parametrize("address", ["", "ray://head:10001", "http://", "head:port", "head:99999", "http://head:0"])
def test_an_address_that_cannot_be_one_is_refused(address):
    with pytest.raises(ConfigError, match="is no address of a job server; write http://HOST:8265"):
        JobServer(address)


def test_what_ray_writes_before_a_job_begins_is_not_the_job_s():
    log = "INFO job_manager.py:581 -- Runtime env is setting up.\nRunning entrypoint for job x: python\nfirst\nsecond\n"
    assert own_output(log) == "first\nsecond\n"
    assert own_output("INFO job_manager.py:581 -- Runtime env is setting up.\n") == ""
