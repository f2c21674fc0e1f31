"""The commands of a run that goes on elsewhere: ``--address`` names the job server that it was submitted to.

    status, scale, drain, checkpoint, stop ──small job──▶ the same command on the head node ──JSON──▶ shown here
    resume ─────────────────────────────────job──────────▶ r2vpo resume there
    logs ◀──────────────────────────────────job's output

What needs no look into the run's folder needs no job either: a run whose job is over is told from the list of jobs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

from r2vpo.job import control_commands, status_command
from r2vpo.job.find_run import is_path
from r2vpo.job.job_server import BEGIN, COMMAND_S, RUN, RUN_DIR, JobServer, RunJob
from r2vpo.job.readings import clock_text
from r2vpo.job.replay_view import printable
from r2vpo.job.run_report import RunReport
from r2vpo.job.seal import seal
from r2vpo.job.settings import ConfigError
from r2vpo.job.shipment import ship_code
from r2vpo.job.submit import add_job_arguments, add_python_argument, passed_on, say_submitted

LAST_LINES = 14
"""Of what a job printed that is over: its result."""
NOT_WELL = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--address`` and what it needs."""
    parser.add_argument("--address", metavar="URL", help="the run goes on there: Ray's job server, http://HOST:8265")
    add_python_argument(parser)


def add_resume_arguments(parser: argparse.ArgumentParser) -> None:
    """The same, and what a job needs that trains."""
    parser.add_argument("--address", metavar="URL", help="resume it there: Ray's job server, http://HOST:8265")
    add_job_arguments(parser)
    parser.add_argument("--json", action="store_true", help="with --address: print JSON, one line")


def run(arguments: argparse.Namespace) -> int:
    """Run a command at ``--address``; returns the exit code. ``ConfigError`` for what the user can put right."""
    remote = _Remote(arguments)
    commands = {
        "status": remote.status,
        "logs": remote.logs,
        "scale": remote.tell,
        "drain": remote.tell,
        "checkpoint": remote.tell,
        "stop": remote.stop,
        "resume": remote.resume,
    }
    return commands[arguments.command]()


class _Remote:
    """One command for one run at one job server."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._server = JobServer(arguments.address)
        self._job = self._find()
        self._path = self._job.path if self._job else arguments.run
        self._here = f"{arguments.run} --address {self._server.address}"
        """How the run is named to another command."""

    def _find(self) -> RunJob | None:
        """The run's job; None for a run that is named by its folder on the head node."""
        arguments = self._arguments
        if is_path(arguments.run):
            return None
        if arguments.run_dir is not None:
            arguments.run = f"{arguments.run_dir}/{arguments.run}"
            return None
        return self._server.find(arguments.run)

    def status(self) -> int:
        """``r2vpo status``."""
        if self._job is not None and self._job.is_over:
            return self._say_over(self._job)
        try:
            answer = self._command(["status", self._path, "--json"])
        except ConfigError as error:
            if self._job is None or "there is no run" not in str(error):
                raise
            raise ConfigError(
                f"job {self._job.job} of run {self._job.run} is {self._job.status.lower()}, and the run has no folder "
                f"yet; r2vpo logs {self._here} --follow"
            ) from None
        return status_command.show(RunReport.from_json(answer), as_json=self._arguments.json, where=self._here)

    def tell(self) -> int:
        """``r2vpo scale``, ``drain`` and ``checkpoint``."""
        self._must_be_alive()
        given, command = self._arguments, self._arguments.command
        pool = ["--pool", given.pool] if command == "scale" and given.pool is not None else []
        words = {"scale": lambda: ["--rollout", str(given.rollout), *pool], "drain": lambda: [given.worker]}
        within_s = control_commands.CHECKPOINT_S if command == "checkpoint" else COMMAND_S
        more = words[command]() if command in words else []
        answer = self._command([command, self._path, *more, "--json"], within_s=within_s)
        return control_commands.say(given, answer)

    def stop(self) -> int:
        """``r2vpo stop``."""
        self._must_be_alive()
        answer = self._command(["stop", self._path, "--no-wait", "--json"])
        if self._arguments.no_wait:
            return control_commands.say(self._arguments, answer)
        if self._job is None:
            raise ConfigError(
                f"{self._path} was told to stop; since it was not submitted here, only r2vpo status {self._here} shows "
                "when it has"
            )
        seen = len(self._server.output(self._job.job))
        while True:
            is_over = self._server.find(self._job.run).is_over
            output = self._server.output(self._job.job)
            if not self._arguments.json and (new := output[seen:]):
                sys.stdout.write(printable(new))
                sys.stdout.flush()
            seen = len(output)
            if is_over:
                break
            time.sleep(1.0)
        job = self._server.find(self._job.run)
        if self._arguments.json:
            print(json.dumps({"run": job.run, "command": "stop", "state": job.end, "job": job.job}))
        else:
            print(f"{job.run}: job {job.job} {job.end}; r2vpo resume {self._here} goes on from the newest checkpoint")
        return 0 if job.exit_code in (0, 130) else NOT_WELL

    def resume(self) -> int:
        """``r2vpo resume``: another job, with the code of this machine."""
        if self._job is not None and not self._job.is_over:
            raise ConfigError(
                f"{self._job.run} is being run by job {self._job.job}; r2vpo status {self._here} shows it, and r2vpo "
                f"stop {self._here} ends it"
            )
        where = Path(self._path)
        name, run_dir = where.name, str(where.parent)
        allowed = [part for key in self._arguments.allow_change for part in ("--allow-change", key)]
        with tempfile.TemporaryDirectory(prefix="r2vpo-ship-") as folder:
            sealed, pad = seal(passed_on(self._arguments.env), Path(folder))
            job = self._server.submit(
                ["r2vpo.job.arrive", "--resume", self._path, *allowed, *self._arguments.overrides],
                name=name,
                modules=[*ship_code(Path(folder)), *pad],
                metadata={RUN: name, RUN_DIR: run_dir},
                env_vars=sealed,
                python=self._arguments.python,
            )
        say_submitted(self._server, run=name, run_dir=run_dir, job=job, brought={}, as_json=self._arguments.json)
        return 0

    def logs(self) -> int:
        """``r2vpo logs``: what the job printed; of one actor, the file on the head node."""
        given = self._arguments
        if self._job is not None and given.actor is None:
            if given.follow:
                asyncio.run(self._follow(self._job.job))
                return 0
            lines = printable(self._server.output(self._job.job)).splitlines()
            print("\n".join(lines if given.lines is None else lines[len(lines) - min(given.lines, len(lines)) :]))
            return 0
        more = [*(["--actor", given.actor] if given.actor else []), *(["--follow"] if given.follow else [])]
        more += ["--lines", str(given.lines)] if given.lines is not None else []
        job = self._server.start_command(["logs", self._path, *more], python=given.python)
        try:
            asyncio.run(self._follow(job))
        except KeyboardInterrupt:
            self._server.stop(job)
            raise
        return 0

    async def _follow(self, job: str) -> None:
        """Print what a job prints, until it is over."""
        begun = False
        rest = ""
        async for text in self._server.follow(job):
            rest += text
            *lines, rest = rest.split("\n")
            for line in lines:
                if begun:
                    print(printable(line), flush=True)
                begun = begun or line.startswith(BEGIN)
        if begun and rest:
            print(printable(rest), flush=True)

    def _command(self, argv: list[str], *, within_s: float = COMMAND_S) -> dict[str, object]:
        return self._server.command(argv, python=self._arguments.python, within_s=within_s)

    def _must_be_alive(self) -> None:
        job = self._job
        if job is not None and job.is_over:
            raise ConfigError(
                f"{job.run} is not running: its job {job.job} {job.end}; r2vpo resume {self._here} goes on from the "
                f"newest checkpoint, r2vpo logs {self._here} shows what it said"
            )

    def _say_over(self, job: RunJob) -> int:
        """How a run ended, by its job: the folder may lie on a node that is gone."""
        last = self._server.output(job.job).strip().splitlines()[-LAST_LINES:]
        if self._arguments.json:
            print(
                json.dumps(
                    {
                        "run": job.run,
                        "path": job.path,
                        "state": job.end,
                        "alive": False,
                        "job": job.job,
                        "exit_code": job.exit_code,
                        "message": job.message,
                    }
                )
            )
        else:
            ago = f" {clock_text(time.time() - job.end_s)} ago" if job.end_s else ""
            print(f"{job.run} is not running: its job {job.job} {job.end}{ago}. What it said last:")
            for line in last or [job.message]:
                print(f"  {printable(line)}")
            print(f"r2vpo resume {self._here} goes on from the newest checkpoint")
        return 0 if job.exit_code == 0 else NOT_WELL
