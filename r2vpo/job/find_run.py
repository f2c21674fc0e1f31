"""Finds the folder of a run that the user names."""

from __future__ import annotations

import argparse
from difflib import get_close_matches
from pathlib import Path

from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError

RUNS = Path("runs")


def find_run(text: str, runs: Path = RUNS) -> Path:
    """The folder of a run, given as a path or as a name in ``runs``. ``ConfigError`` naming near ones if it is none."""
    given = Path(text).expanduser()
    for path in (given, runs / text):
        if RunDir(path).replay.is_dir():
            return path
    for path in (given, runs / text):
        if path.is_dir():
            raise ConfigError(f"{path} is no run, or one that has not begun: it has no folder replay")
    folder = given.parent if len(given.parts) > 1 else runs
    names = _runs_in(folder)
    if not names:
        raise ConfigError(f"there is no run {text}, and none at all in {folder}/; name the folder of one")
    near = get_close_matches(given.name, names, n=5, cutoff=0.5) or names[:5]
    more = "" if len(near) == len(names) else f" and {len(names) - len(near)} more"
    raise ConfigError(f"there is no run {text}; {folder}/ holds {', '.join(near)}{more}")


def is_path(text: str) -> bool:
    """Whether a run is named by its folder rather than by its name."""
    return "/" in text or text.startswith("~")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN``, and where runs lie."""
    parser.add_argument("run", metavar="RUN", help="name of a run, or the path of its folder")
    parser.add_argument("--run-dir", metavar="DIR", help="the folder that holds the runs (runs)")


def run_dir_of(arguments: argparse.Namespace) -> RunDir:
    """The run that ``add_run_arguments`` names. ``ConfigError`` if there is none."""
    runs = RUNS if arguments.run_dir is None else Path(arguments.run_dir).expanduser()
    return RunDir(find_run(arguments.run, runs).absolute())


def _runs_in(folder: Path) -> list[str]:
    """Names of the runs in a folder, the newest first."""
    if not folder.is_dir():
        return []
    runs = [entry for entry in folder.iterdir() if RunDir(entry).replay.is_dir()]
    return [entry.name for entry in sorted(runs, key=lambda entry: entry.stat().st_mtime, reverse=True)]
