"""Drills: every process of a run is killed or stopped in every phase in which it has a part, and the run must go on.

    queue of drills ──▶ a run of the quickstart with two workers and two shards ──▶ its end, audited
         ▲                  │ one fault after the other, each once the one before is cured
         └── what is left ──┘

    python -m benchmarks.faults.drills                                  what is missing of three seeds
    python -m benchmarks.faults.drills --seeds 0                        of one
    python -m benchmarks.faults.drills "rollout worker/append/SIGKILL"  some, always anew

A run takes drills until it nears its target step, since a start costs more than a fault. Moments are drawn by a seed.
Times are ratios within one run: a replacement against the first start of an engine in the same run.

Each run that has ended, well or not, is a line of ``build/faults/drills.jsonl``, and its drills are not done again: the
command may be stopped at any time and given again. With QUICK nothing is kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.faults.drilled_run import drilled, say
from benchmarks.faults.outcomes import DrilledRunResult, figures, keep, kept
from benchmarks.faults.roles import ENGINE, IN_QUICK, Drill, all_drills
from benchmarks.table import QUICK, REPOSITORY, Row, emit

KEPT = REPOSITORY / "build" / "faults" / "drills.jsonl"
SEEDS = (0, 1, 2)


def measure(drills: Sequence[Drill]) -> Iterator[DrilledRunResult]:
    """Runs with all of the drills."""
    for has_engine_process in (False, True):
        left = [drill for drill in drills if (drill.role == ENGINE) == has_engine_process]
        while left:
            with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
                result = drilled(Path(folder), left)
            yield result
            left = left[len(result.outcomes) :]
            say(f"a run of {result.took_s:.0f} s with {len(result.outcomes)} drills is over, {len(left)} are left")


def measure_missing(seeds: Sequence[int], file: Path) -> Iterator[Row]:
    """Do what the file has not, and add up all that it has then of these seeds."""
    drills = all_drills(seeds)
    done = {outcome.drill for run in kept(file) for outcome in run.outcomes}
    for result in measure([drill for drill in drills if drill not in done]):
        keep(result, file)
    yield from figures([run for run in kept(file) if {o.drill for o in run.outcomes} & set(drills)])


def named(name: str) -> Drill:
    """``ROLE/PHASE/SIGNAL``."""
    role, phase, by = name.split("/")
    return Drill(role=role, phase=phase, by=by, seed=0)


def main(arguments: Sequence[str]) -> Iterator[Row]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.drills", description="Kill, and see it go on.")
    parser.add_argument("drills", nargs="*", type=named, metavar="ROLE/PHASE/SIGNAL", help="do these, and keep nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="do what is missing of these (0 1 2)")
    given = parser.parse_args(arguments)
    if given.drills or QUICK:
        return figures(list(measure(given.drills or IN_QUICK)))
    return measure_missing(given.seeds, KEPT)


if __name__ == "__main__":
    emit(main(sys.argv[1:]))
