"""Copies a run's metrics.jsonl to W&B, as a process of its own: ``python -m r2vpo.job.wandb_mirror RUN MODE``.

Consumes the lines of metrics.jsonl; waits for new ones, a second at a time, and for its standard input to close; that
(the job closed it, or died) makes it copy the rest and end. Every line that it prints is a sentence for the user.
"""

from __future__ import annotations

import json
import os
import select
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from r2vpo.job.config import load_config

POLL_S = 1.0
INIT_TIMEOUT_S = 30.0


def main() -> int:
    """Follow the file until standard input closes."""
    folder, mode = Path(sys.argv[1]), sys.argv[2]
    run = _start(folder, mode)
    if run is None:
        return 0
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        is_open = True
        while is_open:
            readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
            is_open = not readable or bool(os.read(sys.stdin.fileno(), 1))
            _copy(file, run)
    run.finish()
    return 0


def _start(folder: Path, mode: str) -> Any:
    """A run of W&B: online if that is wanted and possible, else offline; None if the environment turns it off."""
    import wandb

    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False, verify=False) else "offline")
    if mode == "disabled":
        return None
    if mode == "online":
        try:
            run = _init(wandb, folder, mode)
        except Exception as error:  # noqa: BLE001 - the fault boundary of W&B: no key, no network, no permission
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            _say(f"W&B is offline, it could not be reached: {reason}")
        else:
            _say(f"W&B: {run.url}")
            return run
    run = _init(wandb, folder, "offline")
    _say(f"W&B is offline; `wandb sync {os.path.relpath(Path(run.dir).parent)}` uploads the run later")
    return run


def _init(wandb: Any, folder: Path, mode: str) -> Any:
    return wandb.init(
        name=folder.name,
        dir=str(folder),
        mode=mode,
        config=asdict(load_config(folder / "config.yaml")),
        settings=wandb.Settings(
            console="off", silent=True, init_timeout=INIT_TIMEOUT_S, disable_git=True, disable_code=True
        ),
    )


def _copy(file: TextIO, run: Any) -> None:
    """Log every complete line that has appeared; the rest is read again next time."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        metrics = json.loads(line)
        run.log(metrics, step=metrics["step"])


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # the job is gone: nobody listens, and the copy goes on
        os.write(sys.stdout.fileno(), f"{text}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
