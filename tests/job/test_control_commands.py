import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from r2vpo import cli
from r2vpo.job import control_commands
from r2vpo.job.run_report import look
from r2vpo.job.rundir import RunDir
from tests.job.fake_run import LAST_PHASE, make_status


@pytest.fixture
def live(tmp_path, monkeypatch):
    """Run ``toy`` in ./runs, which another process runs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.job.fake_run", str(tmp_path / "runs"), "toy"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    run = RunDir(tmp_path / "runs" / "toy")
    while not run.status.exists():
        time.sleep(0.01)
    monkeypatch.chdir(tmp_path)
    yield run
    process.kill()
    process.communicate()


@pytest.fixture
def over(tmp_path, monkeypatch):
    """Run ``toy`` in ./runs, which was interrupted after 31 steps."""
    monkeypatch.chdir(tmp_path)
    with RunDir.create(tmp_path / "runs", "toy") as run:
        run.write_config("name: toy\n")
        run.write_summary({"run": "toy", "status": "interrupted", "steps": 31, "wall_s": 62.0})
    return run


@pytest.fixture
def said(capsys):
    def run_command(*argv):
        code = cli.main(argv)
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run_command


def test_commands_reach_the_run_and_stop_waits_for_its_end(live, said):
    assert said("scale", "toy", "--rollout", "3").out == "toy: scale: rollout 3\n"
    scaled = said("scale", "toy", "--rollout", "3", "--json")
    assert json.loads(scaled.out) == {"run": "toy", "command": "scale", "rollout": 3}
    assert said("checkpoint", "toy").out == "toy: checkpoint: step 31\n"
    refused = said("drain", "toy", "rollout-7")
    assert (refused.code, refused.err) == (
        2,
        "r2vpo: error: there is no worker rollout-7; there are rollout-0, rollout-1\n",
    )
    stopped = said("stop", "toy")
    assert live.runner() is None
    assert stopped.code == 0
    assert stopped.out.splitlines()[-3:] == [
        f"toy: {LAST_PHASE}",
        "toy: interrupted after 32 steps in 1:05",
        "r2vpo resume runs/toy goes on from the newest checkpoint",
    ]


def test_stop_can_be_heard_without_being_waited_for(live, said):
    assert said("stop", "toy", "--no-wait").out == "toy: stop: heard\n"
    while live.runner() is not None:
        time.sleep(0.05)


def test_stop_as_json_says_how_it_ended(live, said):
    assert json.loads(said("stop", "toy", "--json").out) == {
        "run": "toy",
        "command": "stop",
        "state": "interrupted",
        "step": 32,
    }


@pytest.mark.parametrize("argv", [["scale", "toy", "--rollout", "2"], ["drain", "toy", "x"], ["checkpoint", "toy"]])
def test_a_run_that_is_over_takes_no_command_and_the_way_on_is_named(over, said, argv):
    refused = said(*argv)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == (
        "r2vpo: error: toy is not running (interrupted after 31 steps in 1:02); r2vpo resume runs/toy goes on from "
        "the newest checkpoint\n"
    )


@pytest.mark.parametrize("command", ["scale", "drain", "checkpoint", "stop", "resume", "logs"])
@pytest.mark.parametrize("name", ["toi", "../x", "/etc"])
def test_a_wrong_run_is_one_sentence_for_every_command(over, said, command, name):
    more = {"scale": ["--rollout", "2"], "drain": ["rollout-0"]}.get(command, [])
    refused = said(command, name, *more)
    assert (refused.code, refused.out, refused.err.count("\n")) == (2, "", 1)
    assert refused.err.startswith(f"r2vpo: error: there is no run {name}") or "is no run" in refused.err


@pytest.mark.parametrize("workers", ["-1", "two", "1.5", ""])
def test_a_number_of_workers_that_is_none_is_refused(over, said, workers):
    assert said("scale", "toy", f"--rollout={workers}").err.startswith("r2vpo: error: argument --rollout: ")


def test_what_a_driver_says_in_words_is_what_a_person_reads():
    answer = {"run": "toy", "command": "scale", "text": "3 rollout workers wanted, 1 serving", "rollout": 3}
    assert control_commands.answer_text(answer) == "toy: scale: 3 rollout workers wanted, 1 serving"


def test_resume_trains_on_with_the_run_s_own_settings(driver, recipe, runs, said):
    assert cli.main(["train", str(recipe)]) == 0
    driver.calls[-1][1].write_summary({"run": "toy", "status": "interrupted", "steps": 3, "wall_s": 1.0})
    assert said("resume", str(runs / "toy"), "learner.steps=7").code == 0
    config, run, resume = driver.calls[-1]
    assert (config.learner.steps, run.path, resume) == (7, runs / "toy", True)


def test_resume_finds_a_run_whose_folder_was_moved(driver, recipe, runs, said, tmp_path):
    assert cli.main(["train", str(recipe)]) == 0
    (runs / "toy").rename(tmp_path / "moved")
    assert said("resume", str(tmp_path / "moved")).code == 0
    config, run, _ = driver.calls[-1]
    assert (config.name, config.run_dir, run.path) == ("moved", str(tmp_path), tmp_path / "moved")


def test_resume_of_a_finished_run_needs_more_steps(driver, recipe, runs, said):
    assert cli.main(["train", str(recipe)]) == 0
    driver.calls[-1][1].write_summary({"run": "toy", "status": "finished", "steps": 3, "wall_s": 1.0})
    refused = said("resume", str(runs / "toy"))
    assert refused.code == 2
    assert "toy is finished; r2vpo resume " in refused.err
    assert "learner.steps=6 goes on" in refused.err
    assert len(driver.calls) == 1


def log(run, name, *lines):
    with (run.logs / f"{name}.log").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)


def test_logs_show_the_end_of_every_file_or_all_of_one(over, said):
    log(over, "rollout-0", *(f"line {number}" for number in range(30)))
    log(over, "learner-0", "\x1b[31mred\x1b[0m", "bell \x07")
    assert said("logs", "toy").out.splitlines() == [
        "── learner-0 ──",
        "red",
        "bell \\u0007",
        "",
        "── rollout-0 ──",
        *(f"line {number}" for number in range(10, 30)),
    ]
    assert len(said("logs", "toy", "--actor", "rollout-0").out.splitlines()) == 30
    assert said("logs", "toy", "--actor", "rollout-0", "--lines", "1").out == "line 29\n"
    assert said("logs", "toy", "--actor", "rollout-0", "--lines", "0").out == ""


@pytest.mark.parametrize("actor", ["rollout-1", "../config", "*"])
def test_an_actor_that_logs_nothing_is_named_with_those_that_do(over, said, actor):
    assert "nothing has been logged yet" in said("logs", "toy", "--actor", actor).err
    log(over, "rollout-0", "x")
    assert said("logs", "toy", "--actor", actor).err.endswith("there are logs of rollout-0\n")


def test_logs_can_be_followed_to_the_end_of_the_run(live, said):
    log(live, "rollout-0", "first")

    def go_on():
        log(live, "learner-0", "second")
        control_commands.tell(live, "stop", within_s=20)

    later = threading.Timer(0.5, go_on)
    later.start()
    followed = said("logs", "toy", "--follow")
    later.join()
    assert followed.out.splitlines() == ["── rollout-0 ──", "first", "", "── learner-0 ──", "second"]
    assert followed.err == "r2vpo: note: toy is over: interrupted after 32 steps in 1:05\n"


def test_a_run_that_falls_silent_while_it_ends_is_said_to_be_waited_for(over, monkeypatch):
    end = look(over)
    spoke = make_status("toy", now_s=1000.0)
    silent = replace(end, state="silent", pid="7", status=spoke)
    reports = iter([replace(silent, state="running"), silent, silent, end])
    monkeypatch.setattr(control_commands, "look", lambda run: next(reports))
    heard = []
    assert control_commands.await_end(over, say=heard.append) == end
    assert heard == ["toy: training", "toy: it says nothing more; waiting for process 7 to end"]
