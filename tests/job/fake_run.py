"""A run without a job: a driver that holds the lock, says something of itself, and hears commands.

python -m tests.job.fake_run FOLDER NAME      in a process of its own, until it is told to stop
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2vpo.job import status
from r2vpo.job.mailbox import serve_mailbox
from r2vpo.job.rundir import RunDir
from r2vpo.job.status import ComponentStatus, RunStatus, StoreStatus, Wait

PHASE = "training"
LAST_PHASE = "checkpoint and model"


def make_status(run: str, *, now_s: float, phase: str = PHASE, **changed: Any) -> RunStatus:
    """A run at step 31 of 100 with a learner and two workers, of which one is coming back."""
    worker = {"role": "rollout", "node": "gpu-b"}
    fields: dict[str, Any] = {
        "run": run,
        "updated_s": now_s,
        "pid": os.getpid(),
        "host": "head",
        "phase": phase,
        "phase_since_s": now_s - 62,
        "step": 31,
        "steps": 100,
        "version": 31,
        "target_workers": 2,
        "components": (
            ComponentStatus(
                name="learner-0", role="learner", state="serving", doing="step 31", since_s=now_s - 1, version=31
            ),
            ComponentStatus(
                name="rollout-0",
                state="serving",
                doing="generates",
                since_s=now_s - 12,
                version=30,
                in_flight=16,
                **worker,
            ),
            ComponentStatus(
                name="rollout-1",
                state="restarting",
                doing="waits for its engine",
                since_s=now_s - 7,
                restarts=1,
                last_error="rollout-1 died",
                **worker,
            ),
        ),
        "store": StoreStatus(
            groups=512,
            fresh_waiting=16,
            in_flight=8,
            stale_eligible=240,
            held_groups=500,
            held_bytes=1_200_000,
            unusable={"late": 3, "damaged": 0},
            waits=(Wait(who="rollout-0", what="a lease", since_s=now_s - 2),),
        ),
        "rates": {
            "time/step_s": 2.0,
            "time/wait_s": 0.5,
            "rollout/tokens_per_s": 1354.0,
            "train/lag_mean": 4.2,
            "train/lag_max": 8,
        },
        "last_error": "rollout-1 died",
    }
    return RunStatus(**fields | changed)


async def drive(run: RunDir) -> None:
    """Behave as a driver until told to stop; then end as one."""
    stopped = asyncio.Event()

    async def handle(command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if command == "drain":
            raise ValueError(f"there is no worker {arguments['worker']}; there are rollout-0, rollout-1")
        if command == "stop":
            stopped.set()
        return {"step": 31} if command == "checkpoint" else dict(arguments)

    serving = asyncio.create_task(serve_mailbox(run.control, handle))
    status.write(run.status, make_status(run.name, now_s=time.time()))
    await stopped.wait()
    status.write(run.status, make_status(run.name, now_s=time.time(), phase=LAST_PHASE))
    await asyncio.sleep(0.5)
    run.write_summary({"run": run.name, "status": "interrupted", "steps": 32, "wall_s": 65.0})
    serving.cancel()


if __name__ == "__main__":
    with RunDir.create(Path(sys.argv[1]), sys.argv[2]) as taken:
        print("ready", flush=True)
        asyncio.run(drive(taken))
