"""The same comparison through Ray, vLLM and DeepSpeed: does the system show what the loop in one process shows?

    python -m benchmarks.evidence.system            runs what is missing, then reports
    python -m benchmarks.evidence.system --report   only reports

R²VPO with replay, GRPO with the same replay and GRPO on-policy train the quickstart's model on its task. All make the
same rollouts, 16 fresh groups of 8 in each of the same number of learner steps; with replay a batch has 48 stale groups
besides. The learning rate is the same for all, and not tuned.

Runs lie in ``build/evidence/system`` and are not made again; what the report needs of them is kept in
``docs/evidence/system.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.evidence.methods import OURS
from benchmarks.evidence.statistics import GAIN, LAST, bootstrap, bootstrap_ratio, rollouts_to
from benchmarks.evidence.warmup import FOLDER
from benchmarks.table import QUICK, REPOSITORY, Row, emit, reported

RECIPE = REPOSITORY / "configs" / "quickstart.yaml"
KEPT = REPOSITORY / "docs" / "evidence" / "system.jsonl"
RUNS = FOLDER / ("system-quick" if QUICK else "system")
FRESH, MEMBERS = 16, 8
"""Groups that a learner step trains on for the first time, and answers in each."""
STEPS = 20 if QUICK else 60
SEEDS = (0,) if QUICK else (0, 1, 2)
LR = 3e-4
OF_A_BUCKET = ("second_moment", "ratio_second_moment", "ess", "weight_mean")
"""Diagnostics by lag that are kept: means over the bucket's tokens."""

REPLAY = (f"learner.groups_per_step={4 * FRESH}", "replay.stale_fraction=0.75", "replay.max_replay_lag=8")
ON_POLICY = (f"learner.groups_per_step={FRESH}", "replay.stale_fraction=0", "replay.max_lag=0")
METHODS: Mapping[str, tuple[str, ...]] = {
    OURS: ("algorithm.name=r2vpo", *REPLAY),
    "GRPO": ("algorithm.name=grpo", *REPLAY),
    "GRPO, on-policy": ("algorithm.name=grpo", *ON_POLICY),
}

Run = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of the system."""

    method: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{list(METHODS).index(self.method)}-{self.seed}"

    def finished(self) -> bool:
        """Whether it ran to its end."""
        summary = RUNS / self.name / "summary.json"
        return summary.exists() and json.loads(summary.read_text())["status"] == "finished"

    def run(self) -> None:
        """Run it, in place of whatever an earlier attempt left. ``CalledProcessError`` if it fails."""
        shutil.rmtree(RUNS / self.name, ignore_errors=True)
        RUNS.mkdir(parents=True, exist_ok=True)
        settings = [f"run_dir={RUNS}", f"name={self.name}", f"seed={self.seed}", f"learner.lr={LR:g}"]
        settings += [f"learner.steps={STEPS}", "learner.checkpoint_every=0", "tracking.wandb=off"]
        command = [sys.executable, "-m", "r2vpo", "train", str(RECIPE), *settings, *METHODS[self.method]]
        with (RUNS / f"{self.name}.log").open("w") as log:
            subprocess.run(command, cwd=REPOSITORY, stdout=log, stderr=subprocess.STDOUT, check=True)

    def result(self) -> dict[str, Any]:
        """What the report needs of the finished run, a JSON value."""
        folder = RUNS / self.name
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        return {
            "method": self.method,
            "seed": self.seed,
            "accuracy": {when: summary["eval"][when]["accuracy"] for when in ("before", "after")},
            "reward": [round(step["train/reward_mean"], 4) for step in steps],
            "second_moment": [float(f"{step.get('dual/second_moment', nan):.3g}") for step in steps],
            "lag": _by_lag(steps),
            "wall_s": round(summary["wall_s"], 1),
        }


def _by_lag(steps: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Diagnostics of each bucket over the run: tokens, and means weighted by them."""
    buckets = {key.split("/")[1]: None for step in steps for key in step if key.startswith("lag/")}
    found = {}
    for bucket in buckets:
        there = [step for step in steps if f"lag/{bucket}/tokens" in step]
        tokens = np.array([step[f"lag/{bucket}/tokens"] for step in there])
        means = {key: np.average([s[f"lag/{bucket}/{key}"] for s in there], weights=tokens) for key in OF_A_BUCKET}
        found[bucket] = {"tokens": float(tokens.sum()), **{k: float(f"{v:.4g}") for k, v in means.items()}}
    return found


def run_all() -> None:
    """What has not been run yet, all methods on one seed after the other."""
    jobs = [Job(method=method, seed=seed) for seed in SEEDS for method in METHODS]
    missing = [job for job in jobs if not job.finished() and not _find(kept(), job)]
    for number, job in enumerate(missing, start=1):
        began_s = time.monotonic()
        job.run()
        print(f"{number}/{len(missing)} {job}: {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
    _keep([job.result() for job in jobs if job.finished()])


def kept() -> list[Run]:
    """Results so far."""
    file = _kept_file()
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _kept_file() -> Path:
    return RUNS / "results.jsonl" if QUICK else KEPT


def _keep(results: Sequence[Run]) -> None:
    """Add results to those kept, in place of older ones of the same runs."""
    by_job = {(run["method"], run["seed"]): run for run in [*kept(), *results]}
    if by_job:
        lines = [json.dumps(by_job[key], ensure_ascii=False) for key in sorted(by_job)]
        _kept_file().write_text("\n".join(lines) + "\n")


def _find(runs: Sequence[Run], job: Job) -> Run | None:
    return next((run for run in runs if (run["method"], run["seed"]) == (job.method, job.seed)), None)


def reported_runs(method: str, runs: Sequence[Run]) -> list[Run]:
    """The runs of a method that are reported, by seed."""
    return [run for seed in SEEDS if (run := _find(runs, Job(method=method, seed=seed)))]


def target(runs: Sequence[Run]) -> float:
    """As in the harness: 90 % of what GRPO gains on-policy in all of its rollouts."""
    rewards = [run["reward"] for run in reported_runs("GRPO, on-policy", runs)]
    if not rewards:
        return nan
    start, end = np.mean([r[0] for r in rewards]), np.mean([r[-LAST:] for r in rewards])
    return float(start + GAIN * (end - start))


def to_target(run: Run, goal: float) -> float:
    """Rollouts until the mean reward of six steps reaches ``goal``; one more than it made if it never did."""
    rollouts = [FRESH * MEMBERS * (i + 1.0) for i in range(len(run["reward"]))]
    needed = rollouts_to(goal, train_reward=run["reward"], rollouts=rollouts)
    return needed if isfinite(needed) else rollouts[-1] + 1


def figures(runs: Sequence[Run]) -> Iterator[Row]:
    """R²VPO with replay over each of its rivals: rollouts to the target, accuracy at equal rollouts."""
    goal, ours = target(runs), reported_runs(OURS, runs)
    for rival in list(METHODS)[1:]:
        theirs = reported_runs(rival, runs)
        count = min(len(ours), len(theirs))
        for what, figure in (
            (f"rollouts to {goal:.2f}", lambda run: to_target(run, goal)),
            ("accuracy at equal rollouts", lambda run: run["accuracy"]["after"]),
        ):
            ratio = bootstrap_ratio([figure(r) for r in ours[:count]], [figure(r) for r in theirs[:count]])
            name = f"whole system: {what}, R²VPO + replay ÷ {rival}"
            yield reported(name, ratio.value, "ratio")
            yield reported(f"{name}: 95 % interval, low", ratio.low, "ratio")
            yield reported(f"{name}: 95 % interval, high", ratio.high, "ratio")


def tables(runs: Sequence[Run]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and lines of the tables: the methods, and the diagnostics by lag."""
    goal = target(runs)
    lines = []
    for method in METHODS:
        if found := reported_runs(method, runs):
            lines.append([
                method,
                str(len(found)),
                str(bootstrap([to_target(run, goal) for run in found])),
                str(bootstrap([run["accuracy"]["after"] for run in found])),
                f"{np.nanmean([run['second_moment'] for run in found]):.2g}",
                f"{np.mean([run['wall_s'] for run in found]):.0f} s",
            ])  # fmt: skip
    head = ["", "runs", f"rollouts to {goal:.2f}", "accuracy", "mean V", "wall"]
    yield f"Whole system, {STEPS} × {FRESH * MEMBERS} rollouts", head, lines
    lines = []
    for method in list(METHODS)[:2]:
        found = reported_runs(method, runs)
        for bucket in buckets(found):
            there = [run["lag"][bucket] for run in found if bucket in run["lag"]]
            means = (f"{np.mean([of[key] for of in there]):.3g}" for key in OF_A_BUCKET)
            lines.append([method, bucket, f"{sum(of['tokens'] for of in there):.0f}", *means])
    head = ["", "lag", "tokens", "mean (u − 1)²", "mean (ρ − 1)²", "ess", "mean w"]
    yield "Whole system with replay, by lag", head, lines


def buckets(runs: Sequence[Run]) -> list[str]:
    """In the order of the lags."""
    return sorted({bucket for run in runs for bucket in run["lag"]}, key=lambda b: int(b.rstrip("+").split("-")[0]))


def main(arguments: Sequence[str]) -> None:
    """Run what is missing; emit the rows."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.system", description="The comparison through the whole system."
    )
    parser.add_argument("--report", action="store_true", help="only report what has been run")
    if not parser.parse_args(arguments).report:
        run_all()
    emit(figures(kept()))


if __name__ == "__main__":
    main(sys.argv[1:])
