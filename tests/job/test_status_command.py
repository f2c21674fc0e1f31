import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from r2vpo import cli
from r2vpo.job import run_report, status
from r2vpo.job.run_report import look
from r2vpo.job.rundir import RunDir
from r2vpo.job.status_view import report_lines
from tests.job.fake_run import make_status

NOW_S = 1_800_000_000.0
HEAVY = {"deepspeed", "pandas", "pyarrow", "ray", "torch", "transformers", "vllm"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``toy`` in ./runs, which this process runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_report, "time", SimpleNamespace(time=lambda: NOW_S))
    with RunDir.create(tmp_path / "runs", "toy") as run:
        yield run


@pytest.fixture
def said(capsys):
    def run_command(*argv):
        code = cli.main(["status", *argv])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err, lines=captured.out.splitlines())

    return run_command


def end(run, **summary):
    run.write_summary({"run": "toy", "status": "finished", "steps": 31, "wall_s": 62.0} | summary)
    os.utime(run.summary, (NOW_S, NOW_S))
    run.close()


def test_a_live_run_shows_every_component_and_what_it_waits_for(run, said):
    status.write(run.status, make_status("toy", now_s=NOW_S))
    shown = said("toy")
    assert shown.code == 0
    assert shown.lines[0] == f"toy  running  step 31 of 100, version 31, process {os.getpid()} on head"
    for text in (
        "  doing      training, for 1:02",
        "  last step  2.00 s, 25 % of it waiting; 1,354 tokens/s; 2:18 left at this pace",
        "lag 4.2 (max 8)",
        "  workers    1 serving of 2 wanted",
        "  store      512 groups: 16 fresh waiting, 240 stale eligible; never sampled: 3 late; 500 on disk, 1.2 MB",
        "  leases     8 prompts are being answered",
        "  waiting    rollout-0 for a lease, for 0:02",
        "  last error rollout-1 died",
        "  next       r2vpo logs runs/toy --follow; r2vpo stop runs/toy ends it with a checkpoint",
    ):
        assert text in shown.out
    assert [line.split() for line in shown.lines[-4:]] == [
        ["learner-0", "serving", "0:01", "31", "–", "0", "step", "31"],
        ["rollout-0", "serving", "0:12", "30", "16", "0", "gpu-b", "generates"],
        ["rollout-1", "restarting", "0:07", "–", "–", "1", "gpu-b", "waits", "for", "its", "engine"],
        ["rollout-1:", "rollout-1", "died"],
    ]


def test_a_narrow_terminal_breaks_between_words_and_keeps_what_a_component_does(run):
    status.write(run.status, make_status("toy", now_s=NOW_S, last_error="one two three four five six seven"))
    lines = [line.plain for line in report_lines(look(run), where="toy", width=40)]
    assert lines[lines.index("  last error one two three four five six") + 1] == "             seven"
    assert [line.split() for line in lines if line.startswith("rollout-0")] == [
        ["rollout-0", "serving", "0:12", "generates"]
    ]


def test_json_says_the_same_to_scripts(run, said):
    status.write(run.status, make_status("toy", now_s=NOW_S))
    answer = json.loads(said("toy", "--json").out)
    assert (answer["state"], answer["alive"], answer["pid"], answer["summary"]) == (
        "running",
        True,
        str(os.getpid()),
        None,
    )
    assert answer["status"]["store"]["waits"][0]["who"] == "rollout-0"
    assert [c["state"] for c in answer["status"]["components"]] == ["serving", "serving", "restarting"]


def test_a_driver_that_has_not_spoken_yet_is_starting_whatever_an_earlier_one_said(run, said):
    assert said("toy").lines[0] == f"toy  starting  process {os.getpid()}, which has not said anything yet"
    status.write(run.status, make_status("toy", now_s=NOW_S, pid=1))
    run.write_summary({"run": "toy", "status": "failed", "steps": 3, "wall_s": 1.0})
    assert said("toy").lines[0].startswith("toy  starting")


def test_a_driver_that_is_there_but_has_fallen_silent_is_said_to(run, said):
    spoke = make_status("toy", now_s=NOW_S)
    status.write(run.status, replace(spoke, updated_s=spoke.updated_s - 95))
    shown = said("toy")
    assert shown.lines[0].startswith("toy  silent  ")
    assert shown.lines[0].endswith("; it has said nothing for 1:35")
    assert f"kill process {os.getpid()} and r2vpo resume runs/toy" in shown.out


def test_a_finished_run_names_its_result_and_how_to_go_on(run, said):
    status.write(run.status, make_status("toy", now_s=NOW_S, last_error=""))
    end(run, eval={"before": {"accuracy": 0.25}, "after": {"accuracy": 0.75}})
    shown = said("toy")
    assert (shown.code, shown.lines) == (
        0,
        [
            "toy  finished  after 31 steps in 1:02",
            "  accuracy   0.250 → 0.750",
            "  next       r2vpo resume runs/toy learner.steps=62 goes on",
        ],
    )


def test_a_failed_run_says_why_and_is_not_well(run, said):
    end(run, status="failed", error="rollout-0 died 4 times")
    shown = said("toy")
    assert shown.code == 1
    assert "  last error rollout-0 died 4 times" in shown.lines
    assert "r2vpo logs runs/toy says why; r2vpo resume runs/toy" in shown.out


@pytest.mark.parametrize("summary", [None, "running"])
def test_a_run_that_nobody_runs_and_that_wrote_no_end_was_killed(run, said, summary):
    status.write(run.status, make_status("toy", now_s=NOW_S))
    if summary:
        end(run, status=summary, steps=12)
    run.close()
    shown = said("toy")
    assert shown.code == 1
    assert shown.lines[0] == "toy  killed  after at least 31 steps"
    assert "  last seen  0:00 ago: training" in shown.lines
    assert "r2vpo resume runs/toy goes on from the newest checkpoint" in shown.out


def test_a_run_killed_since_its_earlier_end_does_not_pass_for_finished(run, said):
    end(run)
    os.utime(run.summary, (NOW_S - 60, NOW_S - 60))
    status.write(run.status, make_status("toy", now_s=NOW_S))
    assert said("toy").lines[0].startswith("toy  killed")


def test_a_run_killed_before_its_first_word_is_told_from_one_that_lives(run, said):
    run.close()
    assert said("toy").lines[0] == "toy  killed  before its first word"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["toi"], "there is no run toi; runs/ holds toy"),
        (["../x"], "there is no run ../x"),
        (["../../../etc/passwd"], "there is no run ../../../etc/passwd"),
        (["toy", "--run-dir", "elsewhere"], "there is no run toy, and none at all in elsewhere/"),
    ],
)
def test_a_wrong_name_is_one_sentence(run, said, argv, message):
    shown = said(*argv)
    assert (shown.code, shown.out) == (2, "")
    assert shown.err.startswith(f"r2vpo: error: {message}")
    assert shown.err.count("\n") == 1


def test_a_run_is_found_by_path_and_below_another_run_dir(run, said, monkeypatch):
    monkeypatch.chdir("/")
    assert said(str(run.path)).lines[0].startswith("toy  starting")
    assert said("toy", "--run-dir", str(run.path.parent)).lines[0].startswith("toy  starting")


def test_a_summary_that_is_none_is_named(run, said):
    run.close()
    run.summary.write_text("[]")
    assert "summary.json is not a summary of a run" in said("toy").err


def test_what_an_error_holds_cannot_steer_the_terminal(run, said):
    status.write(run.status, make_status("toy", now_s=NOW_S, last_error="\x1b[2Jgone"))
    assert "  last error \\u001b[2Jgone" in said("toy").lines


def test_the_command_imports_nothing_heavy(run):
    status.write(run.status, make_status("toy", now_s=time.time()))
    code = "import sys\nfrom r2vpo.cli import main\nmain(['status', 'toy'])\nprint(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("toy  running  step 31 of 100")
    assert not HEAVY & set(ended.stdout.split())
