"""``r2vpo scale | drain | checkpoint | stop RUN``: tell a run that goes on what to do.

    command ──RUN/control──▶ driver ──answer──▶ one line for a person, or JSON

Whether a driver is there is seen at its lock; Ray is not needed for any of it.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from r2vpo.job.find_run import add_run_arguments, run_dir_of
from r2vpo.job.mailbox import ask_run
from r2vpo.job.readings import near_path
from r2vpo.job.run_report import FAILED, SILENT, RunReport, look
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError
from r2vpo.job.status_view import end_sentence, next_step

SOON_S = 15.0
"""Longest wait for a command that only has to be heard (seconds)."""
CHECKPOINT_S = 3600.0
"""Longest wait for a checkpoint: that of a large model on a slow disk, after the learner step under way (seconds)."""
LOOK_S = 0.2
"""Between two looks at a run that is ending (seconds)."""
DID_NOT_END_WELL = 1

EXAMPLES = """\
examples:
  r2vpo scale quickstart-1 --rollout 3
  r2vpo drain quickstart-1 rollout-2
  r2vpo drain quickstart-1 gpu-node-7
  r2vpo checkpoint quickstart-1
  r2vpo stop quickstart-1
"""


def add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``r2vpo scale``."""
    _add_shared(parser)
    parser.add_argument("--rollout", type=_workers, required=True, metavar="N", help="rollout workers there should be")
    parser.add_argument("--pool", metavar="NAME", help="of this pool (rollout.pools); without it, of all together")


def add_drain_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``r2vpo drain``."""
    _add_shared(parser)
    parser.add_argument(
        "worker", metavar="WORKER|NODE", help="a rollout worker's name, or the host or id of a Ray node"
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``r2vpo checkpoint``."""
    _add_shared(parser)


def add_stop_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``r2vpo stop``."""
    _add_shared(parser)
    parser.add_argument("--no-wait", action="store_true", help="return as soon as the run has heard it")


def scale(arguments: argparse.Namespace) -> int:
    """``r2vpo scale``."""
    run = run_dir_of(arguments)
    pool = {"pool": arguments.pool} if arguments.pool is not None else {}
    return say(arguments, tell(run, "scale", within_s=SOON_S, rollout=arguments.rollout, **pool))


def drain(arguments: argparse.Namespace) -> int:
    """``r2vpo drain``."""
    run = run_dir_of(arguments)
    return say(arguments, tell(run, "drain", within_s=SOON_S, worker=arguments.worker))


def checkpoint(arguments: argparse.Namespace) -> int:
    """``r2vpo checkpoint``: returns once it is on disk."""
    run = run_dir_of(arguments)
    return say(arguments, tell(run, "checkpoint", within_s=CHECKPOINT_S))


def stop(arguments: argparse.Namespace) -> int:
    """``r2vpo stop``: returns once the run has ended, telling what it does meanwhile."""
    run = run_dir_of(arguments)
    answer = tell(run, "stop", within_s=SOON_S)
    if arguments.no_wait:
        return say(arguments, answer)
    report = await_end(run, say=(lambda text: None) if arguments.json else (lambda text: print(text, flush=True)))
    return say_end(report, as_json=arguments.json, where=near_path(run.path))


def tell(run: RunDir, command: str, *, within_s: float, **arguments: Any) -> dict[str, Any]:
    """What the driver answers, with the run and the command. ``ConfigError`` says why it cannot, and what to do."""
    report = look(run)
    if not report.is_alive:
        where = near_path(run.path)
        raise ConfigError(f"{run.name} is not running ({end_sentence(report)}); {next_step(report, where)}")
    return {"run": run.name, "command": command, **ask_run(run, command, within_s=within_s, **arguments)}


def await_end(run: RunDir, *, say: Callable[[str], None]) -> RunReport:
    """How a run that was told to stop has ended; its phases are told as they begin."""
    told = None
    while True:
        report = look(run)
        phase = report.status.phase if report.status is not None else None
        if report.state == SILENT:
            phase = f"it says nothing more; waiting for process {report.pid} to end"
        if phase is not None and phase != told:
            told = phase
            say(f"{run.name}: {phase}")
        if not report.is_alive:
            return report
        time.sleep(LOOK_S)


def say_end(report: RunReport, *, as_json: bool, where: str) -> int:
    """Tell how a stopped run has ended; returns 0 unless that was not as it should."""
    failed = report.state not in ("interrupted", "finished")
    if as_json:
        print(json.dumps({"run": report.run, "command": "stop", "state": report.state, "step": report.step}))
    else:
        why = f": {report.error}" if report.state == FAILED and report.error else ""
        print(f"{report.run}: {end_sentence(report)}{why}")
        print(next_step(report, where))
    return DID_NOT_END_WELL if failed else 0


def say(arguments: argparse.Namespace, answer: Mapping[str, Any]) -> int:
    """Print the answer to a command."""
    print(json.dumps(dict(answer), ensure_ascii=False) if arguments.json else answer_text(answer))
    return 0


def answer_text(answer: Mapping[str, Any]) -> str:
    """The answer in one line: ``quickstart-1: scale: rollout 3``; a driver's own words where it has some."""
    facts = {key: value for key, value in answer.items() if key not in ("run", "command", "text")}
    told = answer.get("text") or ", ".join(f"{key} {value}" for key, value in facts.items()) or "heard"
    return f"{answer['run']}: {answer['command']}: {told}"


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, one line")


def _workers(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a number of workers, such as 3")
    return int(text)
