"""The comparison of R²VPO with its rivals: runs what is missing, prints the figures, writes them with tables and plots.

    make bench NAME=evidence [QUICK=1]

Runs are kept in ``build/evidence/runs.jsonl`` (``quick.jsonl``) and not made again: the command may be stopped at any
time and given again. Progress goes to standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import studies
from benchmarks.evidence.report import Results, figures, tables
from benchmarks.evidence.runs import results, run_all
from benchmarks.evidence.warmup import FOLDER
from benchmarks.table import QUICK, REPOSITORY, run_part, table, write


def main(arguments: Sequence[str]) -> int:
    """Run, print, write. Returns 1 if a figure is missed or a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description="Run the comparison, or report it."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one core")
    parser.add_argument("--report", action="store_true", help="only report what has been run")
    given = parser.parse_args(arguments)
    scale = studies.QUICK if QUICK else studies.FULL
    file = FOLDER / ("quick.jsonl" if QUICK else "runs.jsonl")
    failed = 0 if given.report else run(scale, file, jobs=given.jobs)
    found = Results(scale, results(file))
    rows = [*figures(found), *run_part("benchmarks.evidence.cost")]
    print(table(rows))
    write("evidence", rows)
    if not QUICK:
        tables(found, REPOSITORY / "docs" / "evidence")
    return 1 if failed or not all(row.ok for row in rows) else 0


def run(scale: studies.Scale, file: Path, *, jobs: int) -> int:
    """All runs, the main comparison first; the learning rates of a phase are chosen on the phase before it."""
    failed = run_all(list(studies.tuning_runs(scale)), file, jobs=jobs)
    failed += run_all(list(studies.main_runs(scale, Results(scale, results(file)).best_lr)), file, jobs=jobs)
    failed += run_all(list(studies.side_runs(scale)), file, jobs=jobs)
    failed += run_all(list(studies.other_tuning_runs(scale)), file, jobs=jobs)
    failed += run_all(list(studies.other_runs(scale, Results(scale, results(file)).best_lr)), file, jobs=jobs)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
