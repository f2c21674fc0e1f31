"""``r2vpo logs RUN``: what engines, learner ranks and the driver wrote into ``RUN/logs``, once or as it comes."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from r2vpo.job.find_run import add_run_arguments, run_dir_of
from r2vpo.job.readings import near_path
from r2vpo.job.replay_view import printable
from r2vpo.job.run_report import look
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError
from r2vpo.job.status_view import end_sentence

LINES = 20
"""Last lines of each file that are shown of all of them."""
LOOK_S = 0.3
"""Between two looks for new lines (seconds)."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")

EXAMPLES = """\
examples:
  r2vpo logs quickstart-1
  r2vpo logs quickstart-1 --actor rollout-0 --lines 100
  r2vpo logs quickstart-1 --follow
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``r2vpo logs``."""
    add_run_arguments(parser)
    parser.add_argument("--actor", metavar="NAME", help="only this one, such as rollout-0, learner-0 or error")
    parser.add_argument(
        "--lines", type=_count, metavar="N", help=f"last lines to show ({LINES} of each, or all of one)"
    )
    parser.add_argument("--follow", action="store_true", help="go on with new lines until the run ends")


def run(arguments: argparse.Namespace) -> int:
    """Print what was asked for. ``ConfigError`` if there is no such run or actor."""
    where = run_dir_of(arguments)
    logs = _Logs(where, arguments.actor)
    limit = arguments.lines if arguments.lines is not None else None if arguments.actor else LINES
    logs.show(limit)
    if arguments.follow:
        while True:
            report = look(where)
            logs.show(None)
            if not report.is_alive:
                print(f"r2vpo: note: {where.name} is over: {end_sentence(report)}", file=sys.stderr)
                break
            time.sleep(LOOK_S)
    return 0


class _Logs:
    """The log files of a run, and how far each was shown."""

    def __init__(self, run: RunDir, actor: str | None) -> None:
        self._run, self._actor = run, actor
        self._read: dict[Path, int] = {}
        self._last: Path | None = None
        names = [file.stem for file in self._files(None)]
        if actor is not None and actor not in names:
            near = get_close_matches(actor, names, n=3) or names
            there = f"there are logs of {', '.join(near)}" if near else "nothing has been logged yet"
            raise ConfigError(f"--actor {actor}: {near_path(run.logs)} has no {actor}.log; {there}")

    def show(self, limit: int | None) -> None:
        """Print what is new, of each file the last ``limit`` lines at most."""
        for file in self._files(self._actor):
            lines = list(self._new_lines(file))
            kept = lines if limit is None else lines[len(lines) - min(limit, len(lines)) :]
            if kept and self._actor is None and self._last != file:
                print(f"{'' if self._last is None else chr(10)}── {file.stem} ──")
                self._last = file
            for line in kept:
                print(line)
        sys.stdout.flush()

    def _files(self, actor: str | None) -> list[Path]:
        return sorted(file for file in self._run.logs.glob("*.log") if actor in (None, file.stem) and file.is_file())

    def _new_lines(self, file: Path) -> Iterator[str]:
        """Whole lines that were not read before. A terminal must not be steered by them."""
        with file.open("rb") as stream:
            stream.seek(self._read.get(file, 0))
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read[file] = self._read.get(file, 0) + len(whole)
        for line in whole.decode(errors="replace").splitlines():
            yield printable(COLOUR.sub("", line))


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return int(text)
