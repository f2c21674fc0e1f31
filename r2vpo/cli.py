"""The command line: ``r2vpo train CONFIG.yaml [key=value …]``, and commands that look at what runs left.

Every check that needs no heavy import comes first, in the order of what it costs; only when all have passed is the
folder of the run made and the driver, with Ray behind it, imported. Whatever is wrong ends in one sentence on standard
error.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from r2vpo.job import job_commands, plan, remote, replay_commands, replay_step, submit
from r2vpo.job.config import RunConfig, load_config, to_yaml
from r2vpo.job.find_run import add_run_arguments, run_dir_of
from r2vpo.job.history import record_start
from r2vpo.job.preflight import preflight
from r2vpo.job.readings import near_path
from r2vpo.job.resume import Changes, changes_text, check_resumable
from r2vpo.job.run_report import FINISHED, look
from r2vpo.job.rundir import RunDir, occupied
from r2vpo.job.settings import ConfigError
from r2vpo.job.status_view import next_step
from r2vpo.job.versions import check_stack

USAGE_ERROR = 2
INTERRUPTED = 130

EXAMPLES = """\
examples:
  r2vpo train configs/quickstart.yaml
  r2vpo train configs/quickstart.yaml name=mine learner.steps=200 rollout.workers=2
  r2vpo train runs/mine/config.yaml --resume learner.steps=400
  r2vpo config configs/quickstart.yaml learner.lr=1e-4
  r2vpo plan configs/quickstart.yaml rollout.workers=2
  r2vpo submit mine.yaml --address http://HOST:8265
  r2vpo status mine
  r2vpo stop mine
  r2vpo resume mine learner.steps=400
  r2vpo replay stats mine
  r2vpo replay-step mine --step 73
"""


TRAIN = "Train a model. Everything the run leaves lies in run_dir/name (runs/NAME)."
CONFIG = "Print every setting as the run would have it, checked, as YAML."
PLAN = (
    "Say what a run will do, need and take, before anything starts, also for machines that are not here. Nothing is "
    "created."
)
REPLAY_STEP = (
    "Compute a learner step of a run again, from its store and checkpoints, and compare it with what the run recorded. "
    "Nothing is written into the run's folder."
)
REPLAY = "Look at the replay store of a run, also while it goes on."
SUBMIT = (
    "Give a run to a Ray cluster through its job server, with the code of this installation and the local files that "
    "the config names."
)
RESUME_EXAMPLES = """\
examples:
  r2vpo resume quickstart-1
  r2vpo resume quickstart-1 learner.steps=200
  r2vpo resume mine --address http://127.0.0.1:8265 --env WANDB_API_KEY
"""


class _Parser(argparse.ArgumentParser):
    """Argument errors in the form of all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 something to put right, else what the driver says."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        commands = {
            "train": _train,
            "config": _show_config,
            "plan": plan.run,
            "replay": replay_commands.run,
            "replay-step": replay_step.run,
            **dict.fromkeys(job_commands.NAMES, job_commands.run),
            "submit": submit.run,
            "resume": _resume,
        }
        return commands[arguments.command](arguments)
    except ConfigError as error:
        print("r2vpo: error:", " ".join(str(error).split()), file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    arguments, rest = _parser().parse_known_args(argv)
    unknown = [text for text in rest if text.startswith("-")]
    if unknown:
        takes_settings = "overrides" in arguments and "=" in unknown[0]
        hint = " (settings are written without dashes: key=value)" if takes_settings else ""
        option = unknown[0].partition("=")[0]  # without its value, which may be a secret
        raise ConfigError(f"unknown option {option}{hint}; see r2vpo {arguments.command} --help")
    if "overrides" in arguments:
        arguments.overrides += rest  # argparse leaves overrides that stand behind an option
    elif rest:
        raise ConfigError(f"{rest[0]} is one argument too many; see r2vpo {arguments.command} --help")
    return arguments


def _parser() -> _Parser:
    parser = _Parser(
        prog="r2vpo",
        description="R²VPO: RL fine-tuning of language models under a budget on the variance of the policy ratio.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"r2vpo {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def add(name: str, help_text: str, description: str, examples: str | None, *parents: _Parser) -> _Parser:
        return commands.add_parser(
            name,
            parents=parents,
            help=help_text,
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _add_commands(add)
    return parser


def _add_commands(add: Callable[..., _Parser]) -> None:
    """Every command, in the order in which ``--help`` names them."""
    shared = _Parser(add_help=False)
    shared.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the settings of the run")
    shared.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changes a setting, such as learner.steps=200; the last one wins",
    )
    train = add("train", "train a model", TRAIN, EXAMPLES, shared)
    how = train.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the run of this name from its newest checkpoint")
    how.add_argument("--next-free", action="store_true", help="take the next free NAME-1, NAME-2, … as the run's name")
    _add_allow_change(train)
    add("config", "print the resolved settings", CONFIG, None, shared)
    plan.add_arguments(
        add("plan", "say what a run will do and need, and whether it can work", PLAN, plan.EXAMPLES, shared)
    )
    submit.add_arguments(add("submit", "give a run to a cluster", SUBMIT, submit.EXAMPLES, shared))
    job_commands.add_parsers(add)
    resume = add("resume", "go on with a run", "Go on with a run from its newest checkpoint.", RESUME_EXAMPLES)
    add_run_arguments(resume)
    remote.add_resume_arguments(resume)
    resume.add_argument("overrides", nargs="*", metavar="key=value", help="changes a setting, as of train")
    _add_allow_change(resume)
    replay_step.add_arguments(
        add("replay-step", "compute a learner step again, and compare", REPLAY_STEP, replay_step.EXAMPLES)
    )
    replay_commands.add_arguments(add("replay", "look at the trajectories of a run", REPLAY, replay_commands.EXAMPLES))


def _add_allow_change(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on although this setting, such as learner.lr, is not what it was; may be given again for others",
    )


def _show_config(arguments: argparse.Namespace) -> int:
    """``r2vpo config``."""
    print(to_yaml(load_config(arguments.config, arguments.overrides)), end="")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    """``r2vpo train``: check, take the run's folder, hand over to the driver."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.allow_change and not arguments.resume:
        raise ConfigError(f"--allow-change {arguments.allow_change[0]} goes with --resume: a new run takes any setting")
    if not arguments.resume and not arguments.next_free and (Path(config.run_dir) / config.name).exists():
        raise occupied(Path(config.run_dir) / config.name)
    facts = preflight(config)
    warnings = check_stack()
    run, changes = _take(config, arguments)
    with run:
        config = replace(config, name=run.name)
        if arguments.next_free:
            print(f"run {run.name} (the next free name)", flush=True)
        for sentence in (*warnings, *config.notes, *facts.notes):
            print(f"r2vpo: note: {sentence}", file=sys.stderr)
        if changes:
            print(f"r2vpo: note: changed from here on: {changes_text(changes)}", file=sys.stderr)
        # First: it refuses a damaged checkpoint, and the settings must then be what they were.
        record_start(run, config, resume=arguments.resume, num_prompts=facts.num_prompts, changes=changes)
        run.write_config(to_yaml(config))
        os.environ.update(config.ray.environment())
        from r2vpo.job.driver import run_job  # brings Ray: only now

        return run_job(config, run, resume=arguments.resume)


def _resume(arguments: argparse.Namespace) -> int:
    """``r2vpo resume``: ``r2vpo train RUN/config.yaml --resume``, also where the run's folder was moved."""
    if arguments.address is not None:
        return remote.run(arguments)
    run = run_dir_of(arguments)
    report = look(run)
    if report.state == FINISHED and not any(text.startswith("learner.steps=") for text in arguments.overrides):
        raise ConfigError(f"{run.name} is finished; {next_step(report, near_path(run.path))}")
    arguments.config, arguments.resume, arguments.next_free = run.config, True, False
    arguments.overrides = [*arguments.overrides, f"run_dir={run.path.parent}", f"name={run.name}"]
    return _train(arguments)


def _take(config: RunConfig, arguments: argparse.Namespace) -> tuple[RunDir, Changes]:
    """The folder of the run, locked for this process, and what changes in the run's meaning."""
    root = Path(config.run_dir)
    if arguments.next_free:
        return RunDir.create_next(root, config.name), {}
    if not arguments.resume:
        return RunDir.create(root, config.name), {}
    run = RunDir.open(root, config.name)
    try:
        return run, check_resumable(run, config, allowed=arguments.allow_change)
    except ConfigError:
        run.close()
        raise


def _version() -> str:
    try:
        return metadata.version("r2vpo")
    except metadata.PackageNotFoundError:
        return "(not installed)"
