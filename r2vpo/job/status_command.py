"""``r2vpo status RUN``: what a run does, or how it ended; without Ray, so that a busy run is seen at once."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from r2vpo.job.find_run import add_run_arguments, run_dir_of
from r2vpo.job.readings import near_path
from r2vpo.job.replay_view import Screen
from r2vpo.job.run_report import FINISHED, RunReport, look
from r2vpo.job.status_view import report_lines

NOT_WELL = 1
"""Exit code for a run that is neither alive nor finished."""

EXAMPLES = """\
examples:
  r2vpo status quickstart-1
  r2vpo status runs/quickstart-1 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``r2vpo status``."""
    add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, one line")


def run(arguments: argparse.Namespace) -> int:
    """Show the run. Returns 0 if it is alive or finished, else 1. ``ConfigError`` if there is none."""
    return show(look(run_dir_of(arguments)), as_json=arguments.json)


def show(report: RunReport, *, as_json: bool, where: str | None = None) -> int:
    """Print a report; ``where`` is how the user names the run, if not by its path."""
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        screen = Screen()
        screen.say(report_lines(report, where=where or near_path(Path(report.path)), width=screen.width))
    return 0 if report.is_alive or report.state == FINISHED else NOT_WELL
