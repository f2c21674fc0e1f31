"""The comparison of R²VPO with its rivals: runs what is missing, prints the figures, writes them with tables and plots.

    make bench NAME=evidence [QUICK=1]
    python -m benchmarks.evidence --kept --report      what the documentation says, from the runs it keeps

Runs are kept in ``build/evidence/runs.jsonl`` (``quick.jsonl``) and not made again: the command may be stopped at any
time and given again. Progress goes to standard error. The runs behind the documentation are in
``docs/evidence/runs.jsonl.gz``; start weights differ between kinds of processors, and with them the runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import studies
from benchmarks.evidence.report import Results, figures, tables
from benchmarks.evidence.runs import keep, results, run_all, unpack
from benchmarks.evidence.warmup import FOLDER
from benchmarks.table import QUICK, REPOSITORY, run_part, table, write

DOCUMENTATION = REPOSITORY / "docs" / "evidence"


def main(arguments: Sequence[str]) -> int:
    """Run, print, write. Returns 1 if a figure is missed or a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description="Run the comparison, or report it."
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one core")
    parser.add_argument("--report", action="store_true", help="only report what has been run")
    parser.add_argument("--kept", action="store_true", help="begin with the runs that the documentation keeps")
    given = parser.parse_args(arguments)
    scale = studies.QUICK if QUICK else studies.FULL
    file = FOLDER / ("quick.jsonl" if QUICK else "runs.jsonl")
    if given.kept:
        unpack(DOCUMENTATION / "runs.jsonl.gz", file)
    failed = 0 if given.report else run(scale, file, jobs=given.jobs)
    found = Results(scale, results(file))
    system = run_part("benchmarks.evidence.system", *(["--report"] if given.report else []))
    rows = [*figures(found), *run_part("benchmarks.evidence.cost"), *system]
    print(table(rows))
    write("evidence", rows)
    if not QUICK:
        keep(file, DOCUMENTATION / "runs.jsonl.gz")
        tables(found, DOCUMENTATION)
    return 1 if failed or not all(row.ok for row in rows) else 0


def run(scale: studies.Scale, file: Path, *, jobs: int) -> int:
    """All runs, the main comparison first; the learning rates of a phase are chosen on the phase before it."""
    failed = run_all(list(studies.tuning_runs(scale)), file, jobs=jobs)
    failed += run_all(list(studies.main_runs(scale, Results(scale, results(file)).best_lr)), file, jobs=jobs)
    failed += run_all(list(studies.side_runs(scale)), file, jobs=jobs)
    failed += run_all(list(studies.other_tuning_runs(scale)), file, jobs=jobs)
    best_lr = Results(scale, results(file)).best_lr
    failed += run_all(list(studies.other_runs(scale, best_lr)), file, jobs=jobs)
    failed += run_all(list(studies.reuse_runs(scale, best_lr)), file, jobs=jobs)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
