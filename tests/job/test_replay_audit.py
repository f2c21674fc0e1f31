"""``r2vpo replay verify --deep``: what the rest of a run's folder says, held against its store."""

import json
from types import SimpleNamespace

import pytest

from learner import checkpoint
from learner.config import LearnerConfig
from r2vpo import cli
from r2vpo.job import replay_audit
from r2vpo.job.config import ModelConfig, RunConfig, to_yaml
from r2vpo.job.history import NAME, record_start
from r2vpo.job.replay_audit import audit_run
from r2vpo.job.rundir import RunDir
from r2vpo.records import prompt_key
from replay.audit_rules import Order
from replay.config import ReplayConfig
from replay.schema import CONSUMPTION_FILE
from tests.replay.replay_groups import make_group
from tests.replay.stored_runs import StoredRun, tamper

KEYS = [prompt_key(0, index) for index in Order(seed=0, num_prompts=20).of_epoch(0).tolist()]


def settings(**replay):
    return RunConfig(
        name="toy",
        model=ModelConfig(path="model"),
        replay=ReplayConfig(**{"stale_fraction": 0.5, "max_lag": 1, "max_replay_lag": 4, **replay}),
        learner=LearnerConfig(groups_per_step=4, minibatches=2, steps=10),
    )


def start(run, *, resume=False, num_prompts=20, **replay):
    config = settings(**replay)
    run.write_config(to_yaml(config))
    record_start(run, config, resume=resume, num_prompts=num_prompts)


def save(run, step, **changed):
    checkpoint.begin(run.checkpoints, step)
    return checkpoint.commit(run.checkpoints, step, {"version": step, "optimizer_steps": 2 * step, **changed})


def write(run, rows):
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step, groups=4.0, stale=2.0):
    return {"step": step, "train/groups": groups, "train/stale_groups": stale, "learner/optimizer_steps": 2.0}


ROWS = [row(0, 2.0, 0.0), row(1), row(2), row(3)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``toy`` in ./runs: steps 0 to 3 committed, checkpoints after two and four, nobody runs it."""
    monkeypatch.chdir(tmp_path)
    run = RunDir.create(tmp_path / "runs", "toy")
    start(run)
    with StoredRun(run.replay) as stored:
        stored.append(*(make_group(key, version=index // 2) for index, key in enumerate(KEYS[:9])))
        stored.train(0, fresh=[1, 2])
        stored.train(1, fresh=[3, 4], stale=[1, 2])
        stored.train(2, fresh=[5, 6], stale=[1, 3])
        stored.train(3, fresh=[7, 8], stale=[1, 5])
    save(run, 2)
    save(run, 4)
    write(run, ROWS)
    run.close()
    return RunDir(run.path)


def found(run, **how):
    return [(violation.rule, violation.sentence) for violation in audit_run(run, **how).violations]


def test_a_run_whose_parts_agree_holds(run):
    audit = audit_run(run)
    assert (audit.violations, audit.notes, audit.skipped) == ((), (), ("acknowledged",))
    assert (audit.version, audit.num_groups, audit.num_trained) == (4, 9, 14)


def test_a_checkpoint_of_steps_that_are_not_committed_is_named(run):
    save(run, 6)
    assert found(run) == [
        ("checkpoints", "checkpoint step-000006 holds the state after 6 steps, but 4 are committed"),
        ("metrics", "steps 4, 5 are missing, although checkpoint step-000006 was written after it"),
    ]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"version": 3}, "checkpoint step-000004 says that its version is 3"),
        ({"optimizer_steps": 9}, "checkpoint step-000004 has taken 9 optimiser steps, the metrics before it count 8"),
    ],
)
def test_a_checkpoint_that_contradicts_name_or_metrics_is_named(run, changed, sentence):
    save(run, 4, **changed)
    assert found(run) == [("checkpoints", sentence)]


def test_a_complete_checkpoint_that_is_not_whole_is_named(run):
    folder = run.checkpoints / "step-000004"
    about = "checkpoint step-000004 is marked as complete, but "
    marker = json.loads((folder / "COMPLETE").read_text())
    (folder / "trainer.json").write_text("{")
    length = marker["lengths"]["trainer.json"]
    assert found(run) == [("checkpoints", f"{about}trainer.json has 1 bytes, not {length}")]
    (folder / "trainer.json").write_text("{".ljust(length))
    assert found(run) == [("checkpoints", f"{about}the checksum of its trainer.json differs")]
    (folder / "COMPLETE").write_text(json.dumps({**marker, "lengths": {"deepspeed/model.pt": 9}}))
    assert found(run) == [("checkpoints", f"{about}model.pt cannot be read")]
    for none in ("", "[]", "{}"):
        (folder / "COMPLETE").write_text(none)
        assert found(run) == [("checkpoints", f"{about}its COMPLETE is none")]


def test_what_a_kill_leaves_of_a_checkpoint_is_nobodys_business(run):
    checkpoint.begin(run.checkpoints, 6)
    (run.checkpoints / "step-000008").mkdir()  # without its marker
    assert found(run) == []


@pytest.mark.parametrize(
    ("rows", "sentences"),
    [
        ([*ROWS[:1], *ROWS[2:]], ["step 1 is missing, but step 3 is there"]),
        ([*ROWS, ROWS[3]], ["step 3 is there 2 times"]),
        ([ROWS[1], ROWS[0], *ROWS[2:]], ["steps are not in their order"]),
        ([*ROWS, row(4)], ["step 4 is there, but only steps before 4 are committed"]),
        (ROWS[:3], ["step 3 is missing, although checkpoint step-000004 was written after it"]),
        ([*ROWS[:3], row(3, 4.0, 1.0)], ["step 3 trained on 4 groups, 1 of them stale; the log has 4 and 2"]),
    ],
)
def test_metrics_that_lack_repeat_or_contradict_a_step_are_named(run, rows, sentences):
    write(run, rows)
    assert found(run) == [("metrics", sentence) for sentence in sentences]


def test_a_line_of_the_metrics_that_is_none_is_named_and_half_a_last_one_is_not(run):
    run.metrics.write_text(run.metrics.read_text() + '{"step": 4, "tra')
    assert found(run) == []
    run.metrics.write_text("no metrics\n" + run.metrics.read_text())
    assert found(run) == [("metrics", "metrics.jsonl, line 1 is not the metrics of a step: b'no metrics'")]


def test_a_killed_run_may_lack_metrics_since_its_newest_checkpoint_and_a_finished_one_may_not(run):
    write(run, ROWS[:3])
    (run.checkpoints / "step-000004" / "COMPLETE").unlink()
    run.write_summary({"status": "running"})
    assert found(run) == []
    run.write_summary({"status": "finished"})
    assert found(run) == [("metrics", "step 3 is missing, although the run has finished")]


def test_each_step_is_bound_by_the_settings_of_its_own_start(run):
    # Group 1 of version 0 was trained as stale at steps 1 to 3.
    start(run, resume=True, max_replay_lag=3)  # from step 4 on
    assert found(run) == []
    text = (run.path / NAME).read_text().replace("max_replay_lag: 4", "max_replay_lag: 2")
    (run.path / NAME).write_text(text)
    assert found(run) == [
        (
            "lags",
            f"step 3 trained on stale group 1 ({KEYS[0]}) of version 0: lag 3 is above replay.max_replay_lag=2",
        )
    ]


def test_a_start_that_was_killed_before_it_rewound_the_store_binds_none_of_the_earlier_steps(run):
    (run.checkpoints / "step-000004" / "COMPLETE").unlink()
    start(run, resume=True, max_replay_lag=2)  # from step 2 on; but step 3 of lag 3 is of the start before
    assert found(run) == []


def test_without_a_history_config_yaml_binds_and_the_order_is_not_checked(run):
    (run.path / NAME).unlink()
    audit = audit_run(run)
    assert audit.violations == ()
    assert audit.skipped == ("prompts", "acknowledged")
    assert "config.yaml is taken for the settings of every step" in audit.notes[0]
    run.config.write_text("frobnicate: 1\n")
    audit = audit_run(run)
    assert audit.skipped == ("batches", "lags", "verdicts", "prompts", "acknowledged")
    assert "bounds are not checked" in audit.notes[0]


def test_acknowledged_keys_come_from_a_file_whose_last_line_may_be_cut_off(run, tmp_path):
    record = tmp_path / "acknowledged"
    record.write_text(f"{KEYS[0]}\n\n{KEYS[8]}\n{KEYS[15]}")
    audit = audit_run(run, acknowledged=record)
    assert audit.violations == ()
    assert audit.notes == (f"the last line of {record} has no end and is left out: {KEYS[15]}",)
    record.write_text(f"{KEYS[0]}\n{KEYS[15]}\n")
    assert found(run, acknowledged=record) == [
        ("acknowledged", f"the group of prompt {KEYS[15]} was acknowledged, but the store does not hold it")
    ]


def test_what_is_wrong_with_a_run_that_goes_on_must_be_so_twice(run, monkeypatch):
    live = RunDir.open(run.path.parent, "toy")
    waits = []
    write(run, [*ROWS, row(4)])  # as if the store had been rewound between two looks
    monkeypatch.setattr(replay_audit.time, "sleep", lambda s: (waits.append(s), write(run, ROWS)))
    assert found(run) == []
    assert waits == [1.0]
    monkeypatch.setattr(replay_audit.time, "sleep", waits.append)
    tamper(run.replay / CONSUMPTION_FILE, "UPDATE consumption SET uses = 9 WHERE step = 3 AND group_id = 1")
    assert [rule for rule, _ in found(run)] == ["uses"]
    live.close()


@pytest.fixture
def said(capsys):
    def run_command(*argv):
        code = cli.main(["replay", "verify", *argv])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run_command


def test_the_command_says_what_holds_and_what_does_not(run, said):
    result = said("--deep", "toy")
    assert result.code == 0
    assert "toy: 4 steps, 9 groups (9 payloads read, 0 evicted), trained on 14 times" in result.out
    assert "holds        no step trained on a group twice" in result.out
    assert "not checked  every acknowledged group is there" in result.out
    assert result.out.endswith("toy: everything holds\n")
    write(run, ROWS[1:])
    result = said("toy", "--deep")
    assert result.code == 1
    assert "1 WRONG      metrics have" in result.out
    assert "metrics: step 0 is missing, but step 3 is there" in result.out
    assert result.out.endswith("toy: 1 violation\n")
    (run.path / NAME).unlink()
    assert said("--deep", "toy").out.endswith("toy: 1 violation, as far as it could be checked: not prompts\n")
    assert said("--deep", "--quiet", "toy").out == "metrics: step 0 is missing, but step 3 is there\n"


def test_violations_of_one_rule_are_all_counted_and_the_first_are_printed(run, said):
    tamper(run.replay / CONSUMPTION_FILE, "UPDATE consumption SET uses = 9")
    result = said("--deep", "toy", "--json")
    report = json.loads(result.out)
    assert (result.code, report["ok"]) == (1, False)
    assert report["rules"]["uses"]["holds"] is False
    assert report["rules"]["once"]["holds"] is True
    assert report["rules"]["acknowledged"]["holds"] is None
    assert sum(violation["rule"] == "uses" for violation in report["violations"]) == 14


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["toy", "--json"], "--json is an option of verify --deep"),
        (["toy", "--acknowledged", "keys"], "--acknowledged is an option of verify --deep"),
        (["--deep", "toy", "--acknowledged", "keys"], "--acknowledged keys cannot be read"),
        (["--deep", "nobody"], "there is no run nobody"),
    ],
)
def test_what_can_be_put_right_is_one_sentence(run, said, argv, part):
    result = said(*argv)
    assert (result.code, result.out) == (2, "")
    assert part in result.err


def test_a_run_without_a_store_is_one_sentence(run, said):
    (run.replay / CONSUMPTION_FILE).unlink()
    result = said("--deep", "toy")
    assert result.code == 2
    assert "holds no replay store" in result.err
