"""Run a list of settings on some processes, and keep what is finished.

    python -m benchmarks.evidence.runs --file build/evidence/x.jsonl --jobs 2 settings.json

``settings.json`` is a list of objects with the fields of `setting.Setting`. Each finished run is one line of the
results file; what is there already is not run again, so the command may be stopped at any time and given again.

A run that ends in an error is reported and leaves no line, unless the error belongs to the method: a gradient that is
not finite is a result, kept as ``{"id", "setting", "error"}``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.evidence.setting import Setting

NICE = 5
"""Runs give way to everything else on the machine."""


def results(file: Path) -> list[dict[str, Any]]:
    """All finished runs; a last line that was cut off by a kill is left out."""
    if not file.exists():
        return []
    *lines, cut_off = file.read_text().split("\n")
    del cut_off
    return [json.loads(line) for line in lines]


def run_all(settings: Sequence[Setting], file: Path, *, jobs: int) -> int:
    """Run what has no line in the results file yet; returns how many runs ended in an error that is no result."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_off_line(file)
    done = {result["id"] for result in results(file)}
    missing = {setting.id: setting for setting in settings if setting.id not in done}
    _say(f"{len(settings)} settings, {len(missing)} to run, {jobs} at a time")
    failed, began_s = 0, time.monotonic()
    with file.open("a") as lines:
        for number, result in enumerate(_finished(list(missing.values()), jobs), start=1):
            if "failure" in result:
                failed += 1
            else:
                lines.write(json.dumps(result) + "\n")
                lines.flush()
            left_s = (time.monotonic() - began_s) / number * (len(missing) - number)
            _say(f"{number}/{len(missing)} {summary(result)}; {left_s / 60:.1f} min left")
    return failed


def keep(file: Path, kept: Path) -> None:
    """Write the runs of ``file``, sorted by id, to the archive ``kept`` (gzip), with the curves in four digits."""
    lines = [
        json.dumps(_short(result), separators=(",", ":")) for result in sorted(results(file), key=itemgetter("id"))
    ]
    # Without name and time in the header, the same runs are the same bytes.
    with kept.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as archive:
        archive.writelines(line.encode() + b"\n" for line in lines)


def unpack(kept: Path, file: Path) -> None:
    """Add the runs of the archive ``kept`` that ``file`` does not have."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _drop_cut_off_line(file)
    done = {result["id"] for result in results(file)}
    with gzip.open(kept, "rt") as archive, file.open("a") as lines:
        lines.writelines(line for line in archive if json.loads(line)["id"] not in done)


def _short(result: dict[str, Any]) -> dict[str, Any]:
    curve = {name: [float(f"{v:.4g}") for v in values] for name, values in result.get("curve", {}).items()}
    return {**result, "curve": curve} if curve else result


def summary(result: dict[str, Any]) -> str:
    """One line for people."""
    setting = " ".join(f"{name}={value}" for name, value in result["setting"].items())
    for problem in ("failure", "error"):
        if problem in result:
            return f"{setting}: {problem}: {result[problem]}"
    final = result["final"]
    return f"{setting}: {final['accuracy']:.3f} after {result['wall_s']:.0f} s"


def _finished(settings: Sequence[Setting], jobs: int) -> Iterator[dict[str, Any]]:
    """Results as they come, in processes of their own, so that no state passes from one run to the next job."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=os.nice, initargs=(NICE,)) as pool:
        futures = {pool.submit(_run, setting): setting for setting in settings}
        for future in as_completed(futures):
            setting = futures[future]
            try:
                yield future.result()
            except ValueError as error:
                yield {"id": setting.id, "setting": setting.to_json(), "failure": str(error)}


def _run(setting: Setting) -> dict[str, Any]:
    from benchmarks.evidence.loop import run  # torch is loaded by the processes that run, not by the one that waits

    try:
        return run(setting)
    except RuntimeError as error:
        if "non-finite" not in str(error):
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return {"id": setting.id, "setting": setting.to_json(), "error": str(error)}


def _drop_cut_off_line(file: Path) -> None:
    if file.exists() and not (text := file.read_text()).endswith("\n") and text:
        file.write_text(text[: text.rfind("\n") + 1])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.runs", description="Run a list of settings.")
    parser.add_argument("settings", type=Path, help="JSON file: a list of settings")
    parser.add_argument("--file", type=Path, required=True, help="results, one JSON object per line")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    given = parser.parse_args(arguments)
    settings = [Setting.from_json(values) for values in json.loads(given.settings.read_text())]
    return 1 if run_all(settings, given.file, jobs=given.jobs) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
