"""Runs on disk that are damaged, foreign, or somebody else's: stores, checkpoints, histories, locks."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable

import pytest

from learner import checkpoint
from r2vpo import cli
from r2vpo.job.config import load_config, to_yaml
from r2vpo.job.history import record_start
from r2vpo.job.rundir import RunDir
from replay.schema import CONSUMPTION_FILE, shard_file
from tests.bad_input.place import Command, Place, Row, ids
from tests.replay.replay_groups import make_group
from tests.replay.stored_runs import StoredRun, tamper

SHARD = f"replay/{shard_file(0)}"
STATE = {"version": 2, "seed": 0, "ranks": 1, "zero_stage": 0, "dtype": "float32"}


def past_run(place: Place) -> RunDir:
    """A run of three groups and two steps, with a checkpoint after each."""
    run = RunDir.create(place.runs, "toy")
    run.close()
    config = load_config(place.recipe)
    run.write_config(to_yaml(config))
    record_start(run, config, resume=False)
    with StoredRun(run.replay) as store:
        first, second, _ = store.append(make_group(0), make_group(1), make_group(2))
        store.train(0, fresh=[first])
        store.train(1, fresh=[second])
    run.metrics.write_text("".join(json.dumps({"step": step, "step/loss": 0.5}) + "\n" for step in range(2)))
    for step in (1, 2):
        checkpoint.begin(run.checkpoints, step)
        checkpoint.commit(run.checkpoints, step, STATE | {"version": step})
    return run


def spoilt(spoil: Callable[[RunDir], object], *words: str):
    """A command line about a run that was spoilt; ``RECIPE`` and ``RUN`` stand for the two."""

    def arrange(place: Place):
        run = past_run(place)
        spoil(run)
        stands = {"RECIPE": str(place.recipe), "RUN": str(run.path)}
        return Command(stands.get(word, word) for word in words)

    return arrange


def nothing(run: RunDir) -> None:
    """Left as it is."""


def written(path: str, content: str | bytes) -> Callable[[RunDir], object]:
    return lambda run: (run.path / path).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(path: str, share: float) -> Callable[[RunDir], object]:
    def spoil(run: RunDir) -> None:
        whole = (run.path / path).read_bytes()
        (run.path / path).write_bytes(whole[: int(share * len(whole))])

    return spoil


def gone(path: str) -> Callable[[RunDir], object]:
    return lambda run: (run.path / path).unlink()


def foreign_database(run: RunDir) -> None:
    file = run.path / SHARD
    file.unlink()
    with sqlite3.connect(file) as database:
        database.execute("CREATE TABLE music (title TEXT)")
    database.close()


def newer(run: RunDir) -> None:
    tamper(run.path / SHARD, "UPDATE meta SET value = '99' WHERE key = 'schema_version'")


def swapped(run: RunDir) -> None:
    """The consumption log where a shard should be."""
    (run.path / SHARD).write_bytes((run.replay / CONSUMPTION_FILE).read_bytes())


def two_ranks(run: RunDir) -> None:
    checkpoint.begin(run.checkpoints, 1)
    checkpoint.commit(run.checkpoints, 1, STATE | {"version": 1, "ranks": 2})


STATS, VERIFY = ("replay", "stats", "RUN"), ("replay", "verify", "RUN")
AGAIN = ("replay-step", "RUN", "--step", "1")
RESUME = ("train", "RECIPE", "--resume")
NEWEST = "checkpoints/step-000002/trainer.json"
STORES = [
    Row("zero bytes", spoilt(written(SHARD, b""), *STATS), shard_file(0)),
    Row("no database", spoilt(written(SHARD, b"music" * 5000), *STATS), shard_file(0)),
    Row("foreign database", spoilt(foreign_database, *STATS), "shard-000.sqlite3"),
    Row("newer schema", spoilt(newer, *STATS), "has schema version 99, this version of r2vpo reads"),
    Row("cut off", spoilt(cut(SHARD, 0.3), *STATS), shard_file(0)),
    Row("another file of the store", spoilt(swapped, *STATS), "another kind of file of a replay store"),
    Row("no consumption log", spoilt(gone(f"replay/{CONSUMPTION_FILE}"), *VERIFY), CONSUMPTION_FILE),
    Row("no store at all", spoilt(nothing, "replay", "stats", "configs"), "is no run"),
    Row("no such run", spoilt(nothing, "replay", "stats", "tay"), "there is no run tay; runs/ holds toy"),
    Row("no such group", spoilt(nothing, "replay", "show", "RUN", "17"), "has no group 17"),
    Row("export over a run", spoilt(nothing, "replay", "export", "RUN", "--to", "RUN"), "name a file in it"),
]
CHECKPOINTS = [
    Row("state cut off", spoilt(cut(NEWEST, 0.5), *RESUME), "step-000002/trainer.json is damaged"),
    Row("changed settings", spoilt(cut(NEWEST, 0.5), *RESUME, "learner.lr=1e-3"), "trainer.json is damaged"),
    Row("state empty", spoilt(written(NEWEST, ""), *RESUME), "trainer.json is damaged"),
    Row("state a list", spoilt(written(NEWEST, "[]"), *RESUME), "trainer.json is damaged"),
    Row("state binary", spoilt(written(NEWEST, b"\x80\x04\xff"), *RESUME), "trainer.json is damaged"),
    Row("state missing", spoilt(gone(NEWEST), *RESUME), "trainer.json is damaged (it is missing)"),
    Row("of two ranks", spoilt(two_ranks, *AGAIN), "learner.ranks=1 in the run's settings, but"),
    Row("none", spoilt(nothing, *AGAIN, "--checkpoint", "configs"), "is not a complete checkpoint (no file COMPLETE)"),
    Row("too late", spoilt(nothing, *AGAIN[:3], "0", "--checkpoint", "runs/toy/checkpoints/step-000002"), "too late"),
    Row("no such step", spoilt(nothing, "replay-step", "RUN", "--step", "9"), "has not recorded this step"),
    Row("half a step", spoilt(nothing, "replay-step", "RUN", "--step", "1.5"), "1.5 is not the number of a step"),
    Row("history cut off", spoilt(cut("history.jsonl", 0.5), *AGAIN), "history.jsonl is damaged"),
    Row("metrics damaged", spoilt(written("metrics.jsonl", "{\n{}\n"), *AGAIN), "metrics.jsonl, line 1 is damaged"),
    Row("another seed", spoilt(nothing, *RESUME, "seed=3"), "--resume: seed=3 (was 0), but the order of prompts"),
    Row("another model", spoilt(nothing, *RESUME, "model.path=/no/such"), "model.path=/no/such does not exist"),
]
ROWS = [*STORES, *CHECKPOINTS]


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_what_is_not_a_sound_run_of_ours_is_named_and_left_alone(row, refused):
    refused(row)


def test_a_run_that_another_process_runs_is_not_taken(refused, place):
    run = past_run(place)
    with RunDir.open(place.runs, run.name):
        refused(Row("", lambda place: ("--resume",), "runs/toy is being run by process"))


def test_half_a_checkpoint_is_passed_over_for_the_one_before_it(place):
    run = past_run(place)
    (checkpoint.final_path(run.checkpoints, 2) / "COMPLETE").unlink()
    record_start(run, load_config(place.recipe), resume=True)
    starts = [json.loads(line)["step"] for line in (run.path / "history.jsonl").read_text().splitlines()]
    assert starts == [0, 1]


def test_the_run_that_the_tables_spoil_is_sound(place, capsys):
    past_run(place)
    assert cli.main(["replay", "verify", "toy"]) == 0
    assert capsys.readouterr().out == "toy: sound\n"
