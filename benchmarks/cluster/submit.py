"""A job through the job server: submit, look, command, stop, resume, on a head node where r2vpo is not installed.

user ──r2vpo … --address──▶ job server ──▶ driver, engine, learner on the head node
     ──the same with a mistake──▶ one sentence, and how soon
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from benchmarks.cluster.head import Head, head_node
from benchmarks.table import QUICK, Row, at_least, at_most, emit, reported

RECIPE = "configs/quickstart.yaml"
NAME = "quickstart"
SETTINGS = ("task.eval_prompts=16", "tracking.wandb=off")
MORE_STEPS = 6 if QUICK else 12
"""Learner steps of the resumed run beyond those before the stop."""
MANY_STEPS = 100_000
"""The first part of the run goes on until it is stopped."""
BEGIN_S = 240.0
"""Longest wait for the first learner step (seconds)."""
SECRET = "not-a-key-0123456789"


def measure() -> Iterator[Row]:
    with head_node() as head:
        yield from life(head)
        yield from mistakes(head)
        yield at_most("submit: files with the secret that was passed on", leaks(head.home, SECRET), "files", 0)


def life(head: Head) -> Iterator[Row]:
    """Submit, wait for a step, command, stop, resume to the end."""
    head.user["WANDB_API_KEY"] = SECRET
    began_s = time.monotonic()
    expect(head.r2vpo("submit", RECIPE, f"learner.steps={MANY_STEPS}", *SETTINGS, "--env", "WANDB_API_KEY", "--json"))
    yield reported("submit: until the job server has the job", time.monotonic() - began_s, "s")
    status = await_step(head, 1)
    yield reported("submit: until the first learner step", time.monotonic() - began_s, "s")
    yield at_least("submit: components that status shows", len(status["status"]["components"]), "components", 5)
    began_s = time.monotonic()
    expect(head.r2vpo("status", NAME, "--json"))
    yield reported("submit: status through the job server", time.monotonic() - began_s, "s")
    step = answer(head.r2vpo("checkpoint", NAME, "--json"))["step"]
    yield at_least("submit: checkpoint on command", step, "steps done", 1)
    expect(head.r2vpo("stop", NAME))
    stopped = summary(head)
    yield at_least("submit: stopped run interrupted, with its steps", steps_of(stopped, "interrupted"), "steps", step)
    target = stopped["steps"] + MORE_STEPS
    expect(head.r2vpo("resume", NAME, f"learner.steps={target}", "--env", "WANDB_API_KEY", "--json"))
    expect(head.r2vpo("logs", NAME, "--follow"))
    finished = summary(head)
    yield at_least("submit: resumed run finished, with its steps", steps_of(finished, "finished"), "steps", target)
    steps = [json.loads(line)["step"] for line in metrics_file(head).read_text().splitlines()]
    yield at_most(
        "submit: steps missing or twice", len(set(range(target)) ^ set(steps)) + len(steps) - target, "steps", 0
    )


def mistakes(head: Head) -> Iterator[Row]:
    """What a user gets wrong: exit code 2, one sentence, soon. The run is over by now."""
    elsewhere = Head(address="http://127.0.0.1:9", home=head.home, user=head.user)
    stranger = Head(address=head.address, home=head.home, user=head.user | {"RAY_AUTH_TOKEN": "0" * 64})
    for what, machine, argv in (
        ("unreachable address", elsewhere, ("status", NAME)),
        ("another cluster's token", stranger, ("status", NAME)),
        ("wrong run", head, ("scale", "quickstrat", "--rollout", "2")),
        ("run that is over", head, ("scale", NAME, "--rollout", "2")),
        ("name that is taken", head, ("submit", RECIPE)),
    ):
        began_s = time.monotonic()
        done = machine.r2vpo(*argv)
        took_s = time.monotonic() - began_s
        print(f"{what}: {done.stderr.strip()}", file=sys.stderr)
        refused = done.returncode == 2 and done.stderr.startswith("r2vpo: error: ") and done.stderr.count("\n") == 1
        yield at_most(f"submit: {what}, one sentence after", took_s if refused else float("inf"), "s", 5)


def await_step(head: Head, step: int) -> dict[str, Any]:
    """The status of the run once it has done ``step`` learner steps."""
    until_s = time.monotonic() + BEGIN_S
    while True:
        told = head.r2vpo("status", NAME, "--json")
        status = json.loads(told.stdout) if told.stdout else {}
        if status.get("status") and status["status"]["step"] >= step:
            return status
        if time.monotonic() > until_s or status.get("alive") is False:
            raise RuntimeError(f"no learner step: {told}\n{head.r2vpo('logs', NAME).stdout}")
        time.sleep(1)


def expect(done: CompletedProcess[str]) -> CompletedProcess[str]:
    """The command, which must have done what it was told to."""
    if done.returncode != 0:
        raise RuntimeError(f"{done.args}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def answer(done: CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a command printed."""
    return json.loads(expect(done).stdout)


def run_folder(head: Head) -> Path:
    """Where the run must lie, since nothing else was said."""
    return head.home / "r2vpo-runs" / NAME


def metrics_file(head: Head) -> Path:
    return run_folder(head) / "metrics.jsonl"


def summary(head: Head) -> dict[str, Any]:
    return json.loads((run_folder(head) / "summary.json").read_text())


def steps_of(result: dict[str, Any], status: str) -> int:
    """Steps of a run that ended with this status; -1 if it ended with another."""
    return result["steps"] if result["status"] == status else -1


def leaks(folder: Path, secret: str) -> int:
    """Files below ``folder`` that hold the secret."""
    found = 0
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and secret.encode() in file.read_bytes():
            print(f"secret in {file}", file=sys.stderr)
            found += 1
    return found


if __name__ == "__main__":
    emit(measure())
