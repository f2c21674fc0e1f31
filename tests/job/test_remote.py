import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from r2vpo import cli
from r2vpo.job import job_server
from r2vpo.job.job_server import RUN, RUN_DIR
from tests.job.fake_cluster import FakeCluster

ADDRESS = "http://head:8265"


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster to which run ``toy`` was submitted as job ``job-1``; it lies in ``runs`` of the head node's home."""
    home = tmp_path / "head"
    home.mkdir()
    fake = FakeCluster(home)
    monkeypatch.setattr(job_server, "_connect", lambda url: fake)
    fake.add_job("job-1", {RUN: "toy", RUN_DIR: "~/runs"}, status="RUNNING", exit_code=None)
    return fake


@pytest.fixture
def live(cluster):
    """Run ``toy`` is alive on the head node."""
    runs = cluster.home / "runs"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.job.fake_run", str(runs), "toy"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    while not (runs / "toy" / "status.json").exists():
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def said(capsys):
    def run_command(*argv):
        code = cli.main([*argv, "--address", ADDRESS])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run_command


def test_a_live_run_is_seen_and_told_through_the_job_server(cluster, live, said):
    status = said("status", "toy")
    assert status.code == 0
    assert status.out.splitlines()[0].startswith("toy  running  step 31 of 100")
    assert f"r2vpo stop toy --address {ADDRESS} ends it with a checkpoint" in status.out
    assert json.loads(said("status", "job-1", "--json").out)["state"] == "running"
    assert said("scale", "toy", "--rollout", "3").out == "toy: scale: rollout 3\n"
    assert json.loads(said("checkpoint", "toy", "--json").out) == {"run": "toy", "command": "checkpoint", "step": 31}
    refused = said("drain", "toy", "rollout-7")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == "r2vpo: error: there is no worker rollout-7; there are rollout-0, rollout-1\n"
    assert list(cluster.details) == ["job-1"]  # what was done is not left among the jobs


def test_a_run_is_also_named_by_its_folder_there(cluster, live, said):
    assert said("scale", "~/runs/toy", "--rollout", "2").out == "toy: scale: rollout 2\n"
    assert said("scale", "toy", "--run-dir", "~/runs", "--rollout", "2").out == "toy: scale: rollout 2\n"
    assert said("status", "~/runs/none").err.startswith("r2vpo: error: there is no run ~/runs/none; ")


def test_stop_tells_what_the_job_says_until_it_is_over(cluster, live, said, monkeypatch):
    def end_of_job(seconds):
        live.wait()
        cluster.end("job-1", exit_code=130, said="checkpoint and model\ntoy: interrupted after 32 steps\n")

    monkeypatch.setattr("r2vpo.job.remote.time.sleep", end_of_job)
    stopped = said("stop", "toy")
    assert stopped.code == 0
    assert stopped.out.splitlines() == [
        "checkpoint and model",
        "toy: interrupted after 32 steps",
        f"toy: job job-1 was interrupted; r2vpo resume toy --address {ADDRESS} goes on from the newest checkpoint",
    ]


@pytest.mark.parametrize(
    ("exit_code", "status", "words", "code"),
    [
        (0, "SUCCEEDED", "finished", 0),
        (1, "FAILED", "failed", 1),
        (130, "FAILED", "was interrupted", 1),
        (None, "FAILED", "was killed", 1),
        (None, "STOPPED", "was stopped through Ray", 1),
        (3, "FAILED", "ended with exit code 3", 1),
    ],
)
def test_a_run_whose_job_is_over_is_told_without_another_job(cluster, said, exit_code, status, words, code):
    cluster.end("job-1", exit_code=exit_code, status=status, said="first\nlast words \x1b[2J\n")
    told = said("status", "toy")
    assert told.code == code
    assert told.out.splitlines()[0].startswith(f"toy is not running: its job job-1 {words} 0:0")
    assert told.out.splitlines()[1:] == [
        "  first",
        "  last words \\u001b[2J",
        f"r2vpo resume toy --address {ADDRESS} goes on from the newest checkpoint",
    ]
    assert json.loads(said("status", "toy", "--json").out)["alive"] is False
    assert cluster.submitted == []


@pytest.mark.parametrize(
    "argv", [["scale", "toy", "--rollout", "2"], ["drain", "toy", "x"], ["checkpoint", "toy"], ["stop", "toy"]]
)
def test_a_run_whose_job_is_over_takes_no_command(cluster, said, argv):
    cluster.end("job-1", exit_code=1)
    refused = said(*argv)
    assert (refused.code, refused.out, cluster.submitted) == (2, "", [])
    assert refused.err.startswith("r2vpo: error: toy is not running: its job job-1 failed; r2vpo resume toy --address ")


@pytest.mark.parametrize("command", ["status", "logs", "checkpoint", "stop", "resume"])
def test_a_wrong_run_names_those_there_are(cluster, said, command):
    refused = said(command, "toi")
    assert (refused.code, refused.out, cluster.submitted) == (2, "", [])
    assert refused.err.startswith(f"r2vpo: error: there is no run toi among the jobs at {ADDRESS}, which has toy; ")


def test_a_cluster_without_runs_says_how_one_comes_there(cluster, said):
    del cluster.details["job-1"]
    assert f"r2vpo submit CONFIG --address {ADDRESS} does that" in said("status", "toy").err


def test_the_newest_job_of_a_run_counts(cluster, said):
    cluster.end("job-1", exit_code=130)
    cluster.add_job("job-2", {RUN: "toy", RUN_DIR: "~/runs"}, status="FAILED", exit_code=1)
    assert "its job job-2 failed" in said("checkpoint", "toy").err


def test_a_job_whose_run_has_not_begun_is_told_from_a_wrong_name(cluster, said):
    refused = said("status", "toy")
    assert refused.err.startswith("r2vpo: error: job job-1 of run toy is running, and the run has no folder yet; ")


def test_logs_are_what_the_job_printed(cluster, said):
    cluster.end("job-1", exit_code=0, said="one\ntwo\nthree\n")
    assert said("logs", "toy").out == "one\ntwo\nthree\n"
    assert said("logs", "toy", "--lines", "2").out == "two\nthree\n"
    assert said("logs", "toy", "--follow").out == "one\ntwo\nthree\n"


def test_the_log_of_an_actor_comes_from_the_head_node(cluster, live, said):
    (cluster.home / "runs" / "toy" / "logs" / "rollout-0.log").write_text("a\nb\n")
    assert said("logs", "toy", "--actor", "rollout-0", "--lines", "1").out == "b\n"


def test_resume_is_another_job_that_finds_what_the_first_one_brought(cluster, said):
    cluster.runs_commands = False
    alive = said("resume", "toy")
    assert alive.err.startswith("r2vpo: error: toy is being run by job job-1; r2vpo status toy --address ")
    cluster.end("job-1", exit_code=130)
    resumed = said("resume", "toy", "learner.steps=9", "--allow-change", "learner.lr", "--python", "/opt/python")
    assert resumed.code == 0
    (submitted,) = cluster.submitted
    assert submitted["entrypoint"] == (
        "/opt/python -m r2vpo.job.arrive --resume '~/runs/toy' --allow-change learner.lr learner.steps=9"
    )
    assert submitted["metadata"] == {RUN: "toy", RUN_DIR: "~/runs"}


def test_a_command_that_could_not_be_run_says_what_came_instead(cluster, said, monkeypatch):
    original = cluster.submit_job

    def without_r2vpo(**settings):
        settings["runtime_env"]["py_modules"] = []
        settings["entrypoint"] = "python -S -m no_such_module"
        return original(**settings)

    monkeypatch.setattr(cluster, "submit_job", without_r2vpo)
    refused = said("checkpoint", "toy")
    assert refused.code == 2
    assert "checkpoint could not be run on the head node of http://head:8265: " in refused.err
    assert "No module named no_such_module" in refused.err


def test_a_job_server_that_goes_away_is_one_sentence(cluster, said, monkeypatch):
    def gone():
        raise ConnectionError("Connection refused")

    monkeypatch.setattr(cluster, "list_jobs", gone)
    assert "the job server at http://head:8265 refused, or is gone: Connection refused" in said("status", "toy").err


def test_a_resume_that_finds_no_run_says_so_in_its_job(cluster, said):
    cluster.end("job-1", exit_code=130)
    assert said("resume", "toy").code == 0
    assert "r2vpo: error: there is no run ~/runs/toy, and none at all in " in said("status", "toy").out
