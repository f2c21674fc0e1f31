"""Where a submitted job begins on the cluster: ``python -m r2vpo.job.arrive [--resume RUN key=value …]``.

Ray's copy of what the job brought along goes away with the job, but a run may be resumed much later. So it is copied
to ``RUN_DIR/.inputs/NAME`` first, and the run works from there: the paths in its config lie below that folder, and Ray
lets the workers import what lies in the driver's current directory, such as a reward module.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from r2vpo.job.config import load_config
from r2vpo.job.find_run import find_run
from r2vpo.job.rundir import occupied
from r2vpo.job.seal import unseal
from r2vpo.job.settings import ConfigError
from r2vpo.job.shipment import INPUTS

REFUSED = 2
"""Exit code of what the user can put right, as of the command line."""


def main(argv: Sequence[str]) -> int:
    """Become ``r2vpo train`` or ``r2vpo resume``; returns only what refuses that."""
    try:
        if argv[:1] == ["--resume"]:
            run = find_run(argv[1]).absolute()
            home = inputs_of(run)
            if home.is_dir():
                os.chdir(home)
            command = ["resume", str(run), *argv[2:]]
        else:
            os.chdir(keep(shipped_inputs()))
            command = ["train", "config.yaml"]
    except ConfigError as error:
        print(f"r2vpo: error: {error}", file=sys.stderr)
        return REFUSED
    os.environ.update(unseal())
    os.execv(sys.executable, [sys.executable, "-m", "r2vpo", *command])


def shipped_inputs() -> Path:
    """The folder that came with this job."""
    found = next((Path(entry, INPUTS) for entry in sys.path if Path(entry, INPUTS, "config.yaml").is_file()), None)
    assert found is not None, f"{INPUTS} is not on sys.path: this is not a job of r2vpo submit"
    return found


def keep(inputs: Path) -> Path:
    """A copy of the inputs that stays with the run. ``ConfigError`` if the run's name is taken."""
    config = load_config(inputs / "config.yaml")
    run = Path(config.run_dir) / config.name
    if run.exists():
        raise occupied(run)
    home = inputs_of(run)
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        if home.exists():  # of a run of this name that was removed
            shutil.rmtree(home)
        arriving = Path(tempfile.mkdtemp(dir=home.parent, prefix=f".{config.name}."))
        shutil.copytree(inputs, arriving, dirs_exist_ok=True)
        os.chmod(arriving, 0o755)
        os.rename(arriving, home)
    except OSError as error:
        raise ConfigError(
            f"run_dir={config.run_dir} cannot be written on {os.uname().nodename}: {error.strerror or error}; name "
            "another folder of the head node with run_dir=…"
        ) from None
    return home


def inputs_of(run: Path) -> Path:
    """Where the inputs of a submitted run are kept."""
    return run.parent / ".inputs" / run.name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
