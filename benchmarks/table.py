"""The rows of a benchmark: printed as a table, and written as its result file."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
QUICK = bool(os.environ.get("QUICK"))
"""Fewer repetitions, the same rows and targets."""
RESULTS = REPOSITORY / "benchmarks" / "results"


@dataclass(frozen=True)
class Row:
    """One figure against its target."""

    name: str
    value: float
    unit: str
    target: str
    ok: bool


def at_least(name: str, value: float, unit: str, bound: float) -> Row:
    return Row(name, value, unit, f">= {bound:g}", value >= bound)


def at_most(name: str, value: float, unit: str, bound: float) -> Row:
    return Row(name, value, unit, f"<= {bound:g}", value <= bound)


def reported(name: str, value: float, unit: str) -> Row:
    """A figure without a target: for comparison."""
    return Row(name, value, unit, "reported", -inf < value < inf)


def table(rows: Sequence[Row]) -> str:
    """The rows for people."""
    width = max(len(row.name) for row in rows)
    return "\n".join(
        f"{row.name:<{width}}  {row.value:>10.4g} {row.unit:<18} {row.target:<14} {'ok' if row.ok else 'MISSED'}"
        for row in rows
    )


def write(name: str, rows: Sequence[Row]) -> Path:
    """The result file of the benchmark ``name``."""
    RESULTS.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    result = {"machine": machine, "date": time.strftime("%Y-%m-%d"), "rows": [asdict(row) for row in rows]}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return path


def emit(rows: Iterable[Row]) -> None:
    """What a part's process says on its standard output: one JSON object per row, as it comes; and nothing else."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for row in rows:
            print(json.dumps(asdict(row)), file=answers, flush=True)


def run_part(module: str, *arguments: str) -> list[Row]:
    """The rows of a part, measured in a process of its own; what it says besides goes to standard error.

    ``CalledProcessError`` if it fails.
    """
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**json.loads(line)) for line in done.stdout.splitlines()]


def run_benchmark(name: str, parts: Sequence[str], *, only: Sequence[str]) -> int:
    """Measure the parts of a benchmark, or ``only`` some; print the table, and write the result file of the whole.

    Returns 1 if a target is missed or a part did not come to its end.
    """
    rows: list[Row] = []
    for part in only or parts:
        began_s = time.monotonic()
        try:
            rows += run_part(f"benchmarks.{name}.{part}")
        except subprocess.CalledProcessError as error:
            rows.append(Row(f"{part}: measured to its end", float(error.returncode), "exit status", "0", False))
        print(f"{part}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    print(table(rows))
    if not only:
        write(name, rows)
    return 0 if all(row.ok for row in rows) else 1
