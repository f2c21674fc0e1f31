"""``r2vpo replay …``: look at the replay store of a run that goes on, or of one that has ended.

    cli ── add_parser, run ──▶ find the run, open its store read-only ──▶ stats, ls, show, verify, export

Nothing is written beside the run's writers. What an answer lacks because a shard lies elsewhere is said on standard
error.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from r2vpo.job.config import load_config
from r2vpo.job.find_run import find_run
from r2vpo.job.replay_audit import as_json, audit_run, lines_of
from r2vpo.job.replay_view import Screen, export_text, group_lines, listing_lines, stats_lines
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError
from replay.config import ReplayConfig
from replay.errors import ReplayError
from replay.export import export_parquet
from replay.reader import StoredGroup, StoreReader
from replay.shard_view import STATES, GroupFilter, GroupInfo

LONG_BYTES = 200_000_000
"""Of a store that takes more than a moment to verify: what is being read is then said."""
PROBLEMS = 1
BROKEN_PIPE = 141
"""What a shell reports for a command that its reader has left (128 + SIGPIPE)."""

EXAMPLES = """\
examples:
  r2vpo replay stats quickstart-1
  r2vpo replay ls runs/quickstart-1 --state waiting --limit 50
  r2vpo replay ls quickstart-1 --step 12 --json
  r2vpo replay show quickstart-1 0.17 --tokens
  r2vpo replay verify quickstart-1
  r2vpo replay verify --deep quickstart-1
  r2vpo replay export quickstart-1 --to trajectories.parquet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands below ``r2vpo replay``."""
    commands = parser.add_subparsers(dest="replay_command", required=True, metavar="COMMAND", parser_class=type(parser))
    shared = type(parser)(add_help=False)
    shared.add_argument("run", metavar="RUN", help="folder of a run, or its name in ./runs")
    as_json = type(parser)(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print JSON")

    commands.add_parser("stats", parents=[shared, as_json], help="sizes, lags, uses, outcomes, rewards by version")
    ls = commands.add_parser("ls", parents=[shared, as_json], help="list groups, the newest first")
    ls.add_argument("--version", type=_versions, metavar="A[:B]", help="groups with tokens of versions A to B")
    ls.add_argument("--step", type=_count, metavar="S", help="groups that learner step S trained on")
    ls.add_argument("--state", choices=STATES, metavar="STATE", help=f"groups that are {', '.join(STATES)}")
    ls.add_argument("--limit", type=_count, default=20, metavar="N", help="most groups to list (20)")
    show = commands.add_parser("show", parents=[shared, as_json], help="print one group")
    show.add_argument("group", metavar="ID|KEY", help="a group's id, such as 17, or its prompt's key, such as 0.16")
    show.add_argument("--tokens", action="store_true", help="with every token: id, log-prob, version")
    verify = commands.add_parser("verify", parents=[shared], help="read and check everything; exit code 1 if not sound")
    verify.add_argument("--quiet", action="store_true", help="print problems only")
    verify.add_argument(
        "--deep", action="store_true", help="an independent audit of store, checkpoints, metrics and settings"
    )
    verify.add_argument(
        "--acknowledged", type=Path, metavar="FILE", help="with --deep: keys, one a line, whose groups must be there"
    )
    verify.add_argument("--json", action="store_true", help="with --deep: print JSON")
    export = commands.add_parser("export", parents=[shared], help="write trajectories to a Parquet file")
    export.add_argument("--to", type=Path, required=True, metavar="FILE.parquet", help="the file to write")
    export.add_argument("--tokens", action="store_true", help="with the lists of token ids, log-probs and versions")
    export.add_argument("--force", action="store_true", help="replace a file that exists")


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit code. ``ConfigError`` for what the user can put right."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Responses may hold what the terminal's encoding cannot say.
        sys.stdout.reconfigure(errors="backslashreplace")
    path = find_run(arguments.run)
    if arguments.replay_command == "verify" and (arguments.deep or arguments.acknowledged or arguments.json):
        return _verify_deep(path, arguments)
    settings = _settings(path)
    command = {
        "stats": _stats,
        "ls": _ls,
        "show": _show,
        "verify": partial(_verify, settings=settings),
        "export": _export,
    }
    known = settings or ReplayConfig(skip_no_signal="none")
    try:
        with StoreReader(
            RunDir(path).replay, skip_no_signal=known.no_signal_rule, min_verdicts=known.min_verdicts
        ) as reader:
            for sentence in reader.gaps if arguments.replay_command != "verify" else ():
                _note(sentence)
            code = command[arguments.replay_command](reader, path, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The rest of the output has no reader; Python would complain once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except ReplayError as error:
        raise ConfigError(str(error)) from error
    return code


def _stats(reader: StoreReader, path: Path, arguments: argparse.Namespace) -> int:
    stats = reader.stats()
    if arguments.json:
        _say_json({"run": path.name, **asdict(stats)}, indent=2)
    else:
        Screen().say(stats_lines(path.name, stats))
    return 0


def _ls(reader: StoreReader, path: Path, arguments: argparse.Namespace) -> int:
    which = GroupFilter(versions=arguments.version, step=arguments.step, state=arguments.state)
    infos = reader.newest(which, limit=arguments.limit)
    if arguments.json:
        for info in infos:
            _say_json(_info_as_json(info))
        return 0
    # Counting reads every row of a filtered store; it is not needed when the list is not full.
    total = reader.count(which) if len(infos) == arguments.limit else len(infos)
    screen = Screen()
    screen.say(listing_lines(infos, total=total, width=screen.width))
    return 0


def _show(reader: StoreReader, path: Path, arguments: argparse.Namespace) -> int:
    text = arguments.group
    if not re.fullmatch(r"[0-9]+|[0-9]+\.[0-9]+", text):
        raise ConfigError(f"{text} is neither a group's id, such as 17, nor a prompt's key, such as 0.16")
    try:
        stored = reader.group(text if "." in text else int(text))
    except (LookupError, ValueError) as error:
        raise ConfigError(f"{error.args[0]}; r2vpo replay ls {arguments.run} lists what there is") from error
    if arguments.json:
        _say_json(_group_as_json(stored, tokens=arguments.tokens), indent=2)
    else:
        screen = Screen()
        screen.say(group_lines(stored, tokens=arguments.tokens, width=screen.width))
    return 0


def _verify(reader: StoreReader, path: Path, arguments: argparse.Namespace, *, settings: ReplayConfig | None) -> int:
    bounds = {"max_lag": settings.max_lag, "max_replay_lag": settings.max_replay_lag} if settings else {}
    problems, silent = 0, arguments.quiet or reader.file_bytes < LONG_BYTES
    for sentence in reader.verify(**bounds, progress=lambda what: None if silent else _note(what)):
        problems += 1
        print(sentence, flush=True)
    for sentence in () if arguments.quiet else (reader.gaps if reader.missing else ()):
        _note(f"not checked: {sentence}")
    if not arguments.quiet:
        found = f"{problems} problem{'s' * (problems != 1)}" if problems else "sound"
        print(f"{path.name}: {found}")
    return PROBLEMS if problems else 0


def _verify_deep(path: Path, arguments: argparse.Namespace) -> int:
    if not arguments.deep:
        raise ConfigError(f"{'--acknowledged' if arguments.acknowledged else '--json'} is an option of verify --deep")
    num_bytes = sum(file.stat().st_size for file in RunDir(path).replay.glob("*.sqlite3"))
    silent = arguments.quiet or arguments.json or num_bytes < LONG_BYTES
    try:
        audit = audit_run(
            RunDir(path), acknowledged=arguments.acknowledged, progress=lambda what: None if silent else _note(what)
        )
    except ReplayError as error:
        raise ConfigError(str(error)) from error
    if arguments.json:
        _say_json(as_json(path.name, audit), indent=2)
    else:
        for sentence in () if arguments.quiet else audit.notes:
            _note(sentence)
        for line in lines_of(path.name, audit, quiet=arguments.quiet):
            print(line)
    return PROBLEMS if audit.violations else 0


def _export(reader: StoreReader, path: Path, arguments: argparse.Namespace) -> int:
    target: Path = arguments.to
    if target.exists() and (target.is_dir() or not arguments.force):
        hint = "name a file in it" if target.is_dir() else "replace it with --force, or choose another name"
        raise ConfigError(f"--to {target} exists; {hint}")
    if not target.parent.is_dir():
        raise ConfigError(f"--to {target}: there is no folder {target.parent}")
    try:
        done = export_parquet(reader, target, tokens=arguments.tokens, overwrite=arguments.force)
    except OSError as error:
        raise ConfigError(f"--to {target} cannot be written: {error.strerror or error}") from error
    for sentence in done.problems:
        _note(f"left out: {sentence}")
    print(export_text(done, target))
    return PROBLEMS if done.problems else 0


def _settings(path: Path) -> ReplayConfig | None:
    """The store's settings; None, with a note on what cannot be said, where they cannot be read."""
    config = RunDir(path).config
    try:
        if config.is_file():
            return load_config(config).replay
        reason = f"{config} is not there"
    except ConfigError as error:
        reason = str(error)
    _note(
        f"{reason}: lags are not checked, and groups that replay.skip_no_signal or replay.min_verdicts leave out "
        "are said to wait"
    )
    return None


def _info_as_json(info: GroupInfo) -> dict[str, Any]:
    return {**asdict(info), "uses": len(info.trained), "trained": [{"step": s, "kind": k} for s, k in info.trained]}


def _group_as_json(stored: StoredGroup, *, tokens: bool) -> dict[str, Any]:
    """A group as JSON; per-token lists only with ``tokens``."""
    about = _info_as_json(stored.info)
    if stored.group is None:
        return {**about, "problem": stored.problem}
    trajectories = []
    for trajectory in stored.group.trajectories:
        mask_T = trajectory.loss_mask_T
        one: dict[str, Any] = {
            "response": trajectory.response,
            "reward": trajectory.reward,
            "outcome": trajectory.outcome.value,
            "num_tokens": trajectory.num_tokens,
            "num_sampled_tokens": trajectory.num_trained_tokens,
            "mean_logprob": float(trajectory.behavior_logprob_T[mask_T].mean()) if mask_T.any() else None,
        }
        if tokens:
            one |= {
                "token_ids": trajectory.token_ids_T.tolist(),
                "loss_mask": mask_T.tolist(),
                "behavior_logprob": [_finite(value) for value in trajectory.behavior_logprob_T.tolist()],
                "version": trajectory.version_T.tolist(),
            }
        trajectories.append(one)
    return {**about, "prompt": stored.group.prompt, "truth": stored.group.truth, "trajectories": trajectories}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _say_json(value: Any, *, indent: int | None = None) -> None:
    print(json.dumps(value, indent=indent))


def _note(sentence: str) -> None:
    print(f"r2vpo: note: {sentence}", file=sys.stderr, flush=True)


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return int(text)


def _versions(text: str) -> tuple[int, int]:
    """``7`` or ``3:7``."""
    match = re.fullmatch(r"([0-9]{1,18})(?::([0-9]{1,18}))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise argparse.ArgumentTypeError(f"{text} is no range of versions; write 7, or 3:7 for 3 to 7")
    return int(match[1]), int(match[2] or match[1])
