"""The commands for the life of a job: here, or with ``--address`` at a job server."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from r2vpo.job import control_commands, logs_command, remote, status_command


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command of ``r2vpo`` for a run that exists."""

    name: str
    help: str
    description: str
    examples: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    """Carries it out on this machine."""


COMMANDS = (
    Command(
        name="status",
        help="say what a run does, or how it ended",
        description="Say what a run does, component by component, or how it ended. Exit code 1 if it failed, was "
        "interrupted or killed.",
        examples=status_command.EXAMPLES,
        add_arguments=status_command.add_arguments,
        run=status_command.run,
    ),
    Command(
        name="logs",
        help="print what a run has logged",
        description="Print what the parts of a run have logged.",
        examples=logs_command.EXAMPLES,
        add_arguments=logs_command.add_arguments,
        run=logs_command.run,
    ),
    Command(
        name="scale",
        help="set the number of rollout workers",
        description="Set the number of rollout workers of a run that goes on.",
        examples=control_commands.EXAMPLES,
        add_arguments=control_commands.add_scale_arguments,
        run=control_commands.scale,
    ),
    Command(
        name="drain",
        help="take a rollout worker out of service",
        description="Take a rollout worker, or all on a node, out of service: no new prompt, and nothing is lost.",
        examples=control_commands.EXAMPLES,
        add_arguments=control_commands.add_drain_arguments,
        run=control_commands.drain,
    ),
    Command(
        name="checkpoint",
        help="write a checkpoint now",
        description="Write a checkpoint after the learner step that is under way, and return once it is on disk.",
        examples=control_commands.EXAMPLES,
        add_arguments=control_commands.add_checkpoint_arguments,
        run=control_commands.checkpoint,
    ),
    Command(
        name="stop",
        help="end a run with a checkpoint",
        description="End a run after the learner step that is under way, with a checkpoint, and wait until it has "
        "ended.",
        examples=control_commands.EXAMPLES,
        add_arguments=control_commands.add_stop_arguments,
        run=control_commands.stop,
    ),
)
_LOCAL = {command.name: command.run for command in COMMANDS}
NAMES = tuple(_LOCAL)


def add_parsers(add: Callable[[str, str, str, str], argparse.ArgumentParser]) -> None:
    """``add`` makes the parser of a command from its name, help, description and examples."""
    for command in COMMANDS:
        parser = add(command.name, command.help, command.description, command.examples)
        command.add_arguments(parser)
        remote.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Carry out the command that was parsed, here or at ``--address``; returns the exit code."""
    return remote.run(arguments) if arguments.address is not None else _LOCAL[arguments.command](arguments)
