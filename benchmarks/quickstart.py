"""What the quickstart must show: it learns on every seed, off-policy, with exact and short weight syncs, untuned.

    make bench NAME=quickstart [QUICK=1]

Every row comes from the ``summary.json`` of a real run of ``configs/quickstart.yaml`` with the overrides named in the
row. QUICK runs a third of the steps, with the same targets.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.table import QUICK, REPOSITORY, Row, table, write
from r2vpo.job.config import load_config

RECIPE = REPOSITORY / "configs" / "quickstart.yaml"
LR = load_config(RECIPE).learner.lr
SEEDS = {f"seed {seed}": [f"seed={seed}"] for seed in range(3)}
UNTUNED = {"lr ÷ 10": [f"learner.lr={LR / 10:g}"], "lr × 4": [f"learner.lr={LR * 4:g}"]}
OTHERS = {
    setting: [setting]
    for setting in ("algorithm.name=grpo", "rollout.workers=2", "learner.ranks=2", "learner.zero_stage=3")
}


def main() -> int:
    """Run everything, print the table, write the result file."""
    quick = ["learner.steps=27"] if QUICK else []
    summaries = {}
    with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
        for label, overrides in {**SEEDS, **UNTUNED, **OTHERS}.items():
            began_s = time.monotonic()
            summaries[label] = run(Path(folder), label, [*overrides, *quick])
            print(f"{label}: {summaries[label]['status']} in {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    rows = list(figures(summaries))
    print(table(rows))
    write("quickstart", rows)
    return 0 if all(row.ok for row in rows) else 1


def run(folder: Path, label: str, overrides: list[str]) -> dict[str, Any]:
    """Summary of one run, and its peak of memory in GiB; a run that fails is shown with what it said."""
    name = f"run-{len(list(folder.glob('*.log')))}"
    command = [sys.executable, "-m", "r2vpo", "train", str(RECIPE), f"run_dir={folder}", f"name={name}"]
    log = folder / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "tracking.wandb=off", *overrides], cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT
        )
        peak_gib = 0.0
        while process.poll() is None:
            peak_gib = max(peak_gib, memory_gib(process.pid))
            time.sleep(2)
    if process.returncode != 0:
        print(f"{label}: exit {process.returncode}\n{log.read_text()}", file=sys.stderr)
    return {**json.loads((folder / name / "summary.json").read_text()), "peak_gib": peak_gib}


def memory_gib(pid: int) -> float:
    """Memory of a process and all below it: proportional set sizes, so that shared pages count once."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_full_info().pss
    return total / 2**30


def figures(summaries: dict[str, dict[str, Any]]) -> Iterable[Row]:
    """The table of figures, from the summaries by label."""

    def row(name: str, value: float | None, unit: str, target: str, holds: Callable[[float], bool]) -> Row:
        known = float("nan") if value is None else value
        return Row(name, known, unit, target, holds(known))

    for label in SEEDS:
        before, after = (summaries[label]["eval"][when]["accuracy"] for when in ("before", "after"))
        yield row(f"{label}: accuracy before", before, "sampled", "<= 0.55", lambda v: v <= 0.55)
        yield row(f"{label}: accuracy after", after, "sampled", ">= before + 0.25", lambda v, b=before: v >= b + 0.25)
    for label, summary in summaries.items():
        yield row(f"{label}: finished", float(summary["status"] == "finished"), "", "1", lambda v: v == 1)
        yield row(f"{label}: lag.max", summary["lag"]["max"], "versions", ">= 1", lambda v: v >= 1)
        stale = summary["replay"]["stale_fraction_trained"]
        yield row(f"{label}: stale share", stale, "of tokens", "> 0", lambda v: v > 0)
        yield row(f"{label}: sync.count", summary["sync"]["count"], "loads", ">= 20", lambda v: v >= 20)
        gap = summary["sync"]["canary_gap_max"]
        yield row(f"{label}: sync.canary_gap_max", gap, "nats", "<= 1e-4", lambda v: v <= 1e-4)
        pause_s = summary["sync"]["pause_s_p50"]
        yield row(f"{label}: sync.pause_s_p50", pause_s, "s", "<= 0.15", lambda v: v <= 0.15)
    reference = summaries["seed 0"]["eval"]["after"]["accuracy"]
    for label in UNTUNED:
        after = summaries[label]["eval"]["after"]["accuracy"]
        gap = None if after is None or reference is None else abs(after - reference)
        yield row(f"{label}: accuracy after - that of seed 0", gap, "absolute", "<= 0.05", lambda v: v <= 0.05)
    for label, summary in summaries.items():
        yield row(f"{label}: wall", summary["wall_s"], "s", "<= 240", lambda v: v <= 240)
        yield row(f"{label}: peak of memory", summary["peak_gib"], "GiB", "< 12", lambda v: v < 12)


if __name__ == "__main__":
    sys.exit(main())
