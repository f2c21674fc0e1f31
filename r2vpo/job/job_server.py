"""Ray's job server, as this machine sees it: connect to it, find the job of a run, run a command on the head node.

    r2vpo … --address ──HTTP──▶ job server ──▶ JobSupervisor ──▶ python -m r2vpo … on the head node

Whatever is wrong with it is one sentence within seconds: the address is tried with a short deadline before Ray is
imported, and what jobs there are costs one request.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from r2vpo.job.settings import ConfigError
from r2vpo.job.shipment import ship_code

T = TypeVar("T")
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
CONNECT_S = 3.0
"""Longest wait for the job server's first answer (seconds)."""
COMMAND_S = 90.0
"""Longest wait for a short command on the head node (seconds): Ray starts two processes for it."""
AGENT_S = 60.0
AGENT_PAUSE_S = 1.0
NO_AGENT = "No available agent to submit job"
"""Ray's answer in the first seconds of a head node: its job agent is still starting, and is waited for (seconds)."""
POLL_S = 0.2
RUN, RUN_DIR, HELPER = "r2vpo_run", "r2vpo_run_dir", "r2vpo_command"
"""Metadata of jobs: the name of the run that a job drives, the folder of the runs; and of a job that runs a command."""
STOP_WAIT_S = 300
"""How long ``ray job stop`` lets a run write its checkpoint before it kills it (seconds); Ray's default is 3."""
OVER = ("SUCCEEDED", "FAILED", "STOPPED")
RAY_LOGGERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
"""They tell of every package and connection."""
BEGIN = "Running entrypoint for job "
"""Ray's line in a job's log before what the job itself says."""


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """The newest job that drives a run."""

    run: str
    run_dir: str
    """Folder of the runs on the head node; may begin with ``~``."""
    job: str
    """Submission id."""
    status: str
    """Ray's word for its state."""
    exit_code: int | None
    message: str
    start_s: float
    end_s: float | None

    @property
    def path(self) -> str:
        """The run's folder on the head node."""
        return f"{self.run_dir}/{self.run}"

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, however it did."""
        return self.status in OVER

    @property
    def end(self) -> str:
        """How a job that is over ended, in words."""
        if self.status == "STOPPED":
            return "was stopped through Ray"
        words = {0: "finished", 1: "failed", 2: "was refused", 130: "was interrupted", None: "was killed"}
        return words.get(self.exit_code, f"ended with exit code {self.exit_code}")


class JobServer:
    """A job server that has answered."""

    def __init__(self, address: str) -> None:
        """Connect. ``ConfigError`` if no job server answers at ``address``, or not to us."""
        self.address = _url(address)
        self._client = _connect(self.address)

    def submit(
        self,
        arguments: Sequence[str],
        *,
        name: str,
        modules: Sequence[Path],
        metadata: Mapping[str, str],
        env_vars: Mapping[str, str],
        python: str,
    ) -> str:
        """Submit ``python -m …`` and return the job's id."""
        until_s = time.monotonic() + AGENT_S
        while True:
            try:
                return self._ask(
                    self._client.submit_job,
                    entrypoint=shlex.join([python, "-m", *arguments]),
                    submission_id=f"r2vpo-{name}-{secrets.token_hex(4)}",
                    runtime_env={
                        "py_modules": [str(path) for path in modules],
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S), **env_vars},
                    },
                    metadata=dict(metadata),
                )
            except ConfigError as error:
                if NO_AGENT not in str(error) or time.monotonic() > until_s:
                    raise
                time.sleep(AGENT_PAUSE_S)

    def jobs(self) -> list[RunJob]:
        """The newest job of every run that was submitted here, the newest first."""
        found: dict[str, RunJob] = {}
        told = [job for job in self._ask(self._client.list_jobs) if job.submission_id and RUN in (job.metadata or {})]
        for job in sorted(told, key=lambda job: job.start_time or 0, reverse=True):
            name = job.metadata[RUN]
            found.setdefault(
                name,
                RunJob(
                    run=name,
                    run_dir=job.metadata[RUN_DIR],
                    job=job.submission_id,
                    status=str(job.status.value),
                    exit_code=job.driver_exit_code,
                    message=job.message or "",
                    start_s=(job.start_time or 0) / 1000,
                    end_s=job.end_time / 1000 if job.end_time else None,
                ),
            )
        return list(found.values())

    def find(self, text: str) -> RunJob:
        """The newest job of the run ``text``, which may also be that job's id. ``ConfigError`` if there is none."""
        jobs = self.jobs()
        for job in jobs:
            if text in (job.run, job.job):
                return job
        names = [job.run for job in jobs]
        if not names:
            raise ConfigError(
                f"no run was submitted to {self.address}: r2vpo submit CONFIG --address {self.address} does that; a "
                "run that was started otherwise is named by the path of its folder there"
            )
        near = get_close_matches(text, names, n=5, cutoff=0.5) or names[:5]
        raise ConfigError(
            f"there is no run {text} among the jobs at {self.address}, which has {', '.join(near)}; a run that was "
            "started otherwise is named by the path of its folder there"
        )

    def status(self, job: str) -> str:
        """Ray's word for the state of a job."""
        return str(self._ask(self._client.get_job_status, job).value)

    def output(self, job: str) -> str:
        """What a job has printed."""
        return own_output(self._ask(self._client.get_job_logs, job))

    def follow(self, job: str) -> Any:
        """What a job prints, as it comes: an async iterator of text, Ray's own lines included."""
        return self._client.tail_job_logs(job)

    def stop(self, job: str) -> None:
        """Ask Ray to end a job."""
        self._ask(self._client.stop_job, job)

    def start_command(self, argv: Sequence[str], *, python: str) -> str:
        """Start ``r2vpo ARGV`` on the head node as a job of its own, with the code of this machine."""
        with tempfile.TemporaryDirectory(prefix="r2vpo-ship-") as folder:
            return self.submit(
                ["r2vpo", *argv],
                name=argv[0],
                modules=ship_code(Path(folder)),
                metadata={HELPER: argv[0]},
                env_vars={},
                python=python,
            )

    def command(self, argv: Sequence[str], *, python: str, within_s: float = COMMAND_S) -> dict[str, Any]:
        """The JSON that ``r2vpo ARGV`` prints on the head node. ``ConfigError`` with its own sentence if it refuses."""
        job = self.start_command(argv, python=python)
        until_s = time.monotonic() + within_s
        while (status := self.status(job)) not in OVER:
            if time.monotonic() > until_s:
                self.stop(job)
                raise ConfigError(
                    f"{argv[0]} did not end within {within_s:g} s on the head node of {self.address} (job {job}, "
                    f"{status.lower()}); try again, or look with ray job logs {job}"
                )
            time.sleep(POLL_S)
        output = self.output(job)
        told = [line for line in output.splitlines() if line.startswith(("{", "r2vpo: error: "))]
        if not told:
            message = self._ask(self._client.get_job_info, job).message or status
            last = (output.strip().splitlines() or [message])[-1]
            raise ConfigError(
                f"{argv[0]} could not be run on the head node of {self.address}: {last}; ray job logs {job} has more"
            )
        self._ask(self._client.delete_job, job)  # its answer is here, and the list of jobs is for runs
        if not told[-1].startswith("{"):
            raise ConfigError(told[-1].removeprefix("r2vpo: error: "))
        return json.loads(told[-1])

    def _ask(self, request: Callable[..., T], *arguments: Any, **settings: Any) -> T:
        """The answer to a request. ``ConfigError`` if the server refuses it, or is gone."""
        from ray.exceptions import RayError

        try:
            return request(*arguments, **settings)
        except (RuntimeError, ValueError, OSError, RayError) as error:
            raise ConfigError(f"the job server at {self.address} refused, or is gone: {_first_line(error)}") from None


def own_output(log: str) -> str:
    """A job's log without what Ray wrote before the job began."""
    before, begin, rest = log.partition(BEGIN)
    return rest.partition("\n")[2] if begin else "" if "job_manager" in before else before


def _url(address: str) -> str:
    """The address as a URL. ``ConfigError`` if it cannot be one."""
    text = address if "://" in address else f"http://{address}"
    parts = urllib.parse.urlsplit(text)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"--address {address} is no address of a job server; write http://HOST:8265")
    return text.rstrip("/")


def _connect(url: str) -> Any:
    """Ray's client. ``ConfigError`` if there is no job server, or it wants a token that we do not have."""
    try:
        with urllib.request.urlopen(f"{url}/api/version", timeout=CONNECT_S) as answer:
            known = "ray_version" in json.load(answer)
    except urllib.error.HTTPError as error:
        known = error.code in (401, 403)
        if error.code == 401:
            # The cluster asks for its token, which Ray's client sends in this mode only.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
    except ValueError:
        known = False
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConfigError(
            f"--address {url}: nothing answers there ({reason}); is the head node up, with its dashboard (ray start "
            "--head --include-dashboard=true), and is that port reachable from here (ssh -L, kubectl port-forward)?"
        ) from None
    if not known:
        raise ConfigError(f"--address {url}: what answers there is no job server of Ray; its port is 8265 by default")
    os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")  # what is shipped was chosen here
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    for name in RAY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return JobSubmissionClient(url)
    except (RuntimeError, OSError, RayError) as error:
        text = _first_line(error)
        if "uthenti" in text or "uthoriz" in text or "token" in text:
            raise ConfigError(
                f"--address {url} asks for the cluster's token, and got none or another one; put it into "
                "RAY_AUTH_TOKEN or ~/.ray/auth_token (on the head node, ray get-auth-token prints it)"
            ) from None
        raise ConfigError(f"--address {url}: {text}") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
