"""A job server without Ray: a job's command runs at once, to its end, with what the job brought along and no more."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from r2vpo.job.job_server import BEGIN, OVER


@dataclass
class FakeCluster:
    """Stands where Ray's ``JobSubmissionClient`` would; ``home`` is the head node's home folder."""

    home: Path
    details: dict[str, SimpleNamespace] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    runs_commands: bool = True
    ticks: Iterator[int] = field(default_factory=count)

    def submit_job(self, *, entrypoint, submission_id, runtime_env, metadata) -> str:
        self.submitted.append({"entrypoint": entrypoint, "metadata": metadata, "env_vars": runtime_env["env_vars"]})
        packages = self.home / "packages" / submission_id
        packages.mkdir(parents=True)
        for number, module in enumerate(runtime_env["py_modules"]):
            shutil.copytree(module, packages / str(number) / Path(module).name)
        path = os.pathsep.join(str(folder) for folder in packages.iterdir())
        self.add_job(submission_id, metadata, status="RUNNING", exit_code=None)
        if self.runs_commands or "arrive" not in entrypoint:
            done = subprocess.run(
                entrypoint.replace("python", sys.executable, 1),
                shell=True,
                cwd=self.home,
                env={**os.environ, "PYTHONPATH": path, "HOME": str(self.home)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            self.end(submission_id, exit_code=done.returncode, said=done.stdout)
        return submission_id

    def add_job(self, job, metadata, *, status, exit_code, message="", said="") -> None:
        """A job that was submitted."""
        self.details[job] = SimpleNamespace(
            submission_id=job,
            metadata=metadata,
            status=SimpleNamespace(value=status),
            driver_exit_code=exit_code,
            message=message,
            start_time=next(self.ticks),
            end_time=int(1000 * time.time()) if status in OVER else None,
        )
        self.logs[job] = f"INFO job_manager.py: Runtime env is setting up.\n{BEGIN}{job}: x\n{said}"

    def end(self, job, *, exit_code, said="", status=None) -> None:
        """The end of a job."""
        word = status or ("SUCCEEDED" if exit_code == 0 else "FAILED")
        self.add_job(job, self.details[job].metadata, status=word, exit_code=exit_code, said=said)

    def list_jobs(self) -> list[SimpleNamespace]:
        return list(self.details.values())

    def get_job_info(self, job) -> SimpleNamespace:
        return self.details[job]

    def get_job_status(self, job) -> SimpleNamespace:
        return self.details[job].status

    def get_job_logs(self, job) -> str:
        return self.logs[job]

    async def tail_job_logs(self, job) -> AsyncIterator[str]:
        text = self.logs[job]
        yield text[:40]
        yield text[40:]

    def stop_job(self, job) -> None:
        self.end(job, exit_code=None, status="STOPPED")

    def delete_job(self, job) -> None:
        del self.details[job]
