"""What a run says of itself while it goes on: ``RUN/status.json``, replaced by the driver about once a second.

    driver ──write──▶ status.json ──read──▶ r2vpo status

Times are Unix seconds. What a run came to when it is over is in summary.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from r2vpo.job.rundir import write_whole
from r2vpo.job.settings import ConfigError

ROLES = ("learner", "board", "replay", "shard", "rollout")
STATES = ("starting", "serving", "draining", "restarting", "stopped")


@dataclass(frozen=True, kw_only=True)
class ComponentStatus:
    """One process of the job, other than the driver."""

    name: str
    """Such as ``rollout-0``."""
    role: str
    """One of `ROLES`."""
    state: str
    """One of `STATES`."""
    doing: str
    """What it does, or what it waits for and on whom, in words."""
    since_s: float
    """Since when it does that."""
    restarts: int = 0
    """How often it was started again."""
    last_error: str = ""
    """What its last restart was for."""
    version: int | None = None
    """Version of the weights that it holds; None where that means nothing."""
    in_flight: int | None = None
    """Groups that it generates; None where that means nothing."""
    node: str = ""
    """Host that it lives on."""
    node_id: str = ""
    """Ray's name of that machine."""
    pool: str = ""
    """Of a rollout worker: its pool; empty where there are none."""

    def __post_init__(self) -> None:
        assert self.role in ROLES, self.role
        assert self.state in STATES, self.state


@dataclass(frozen=True, kw_only=True)
class Wait:
    """Somebody waits for the replay store."""

    who: str
    what: str
    """What is waited for, in words."""
    since_s: float


@dataclass(frozen=True, kw_only=True)
class StoreStatus:
    """What the replay store holds and has handed out, in groups."""

    groups: int
    """Ever appended."""
    fresh_waiting: int
    """Never consumed."""
    in_flight: int
    """Leased."""
    stale_eligible: int
    """Young enough to be sampled again."""
    held_groups: int
    """With their payload on disk."""
    held_bytes: int
    unusable: Mapping[str, int] = field(default_factory=dict)
    """Never sampled, by reason."""
    troubles: tuple[str, ...] = ()
    """What keeps the store from working as it should, one sentence each."""
    waits: tuple[Wait, ...] = ()

    @classmethod
    def from_stats(cls, stats: Mapping[str, Any]) -> Self:
        """From what ``ReplayService.stats`` answers."""
        return cls(
            groups=stats["groups"],
            fresh_waiting=stats["fresh_waiting"],
            in_flight=stats["in_flight"],
            stale_eligible=stats["stale_eligible"],
            held_groups=stats["held_groups"],
            held_bytes=stats["held_bytes"],
            unusable=dict(stats["unusable"]),
            troubles=tuple(stats["troubles"]),
            waits=tuple(Wait(**wait) for wait in stats["waits"]),
        )


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at one moment."""

    run: str
    """Its name."""
    updated_s: float
    """The moment."""
    pid: int
    """The driver's process."""
    host: str
    """The driver's machine."""
    phase: str
    """What the run as a whole does, in words."""
    phase_since_s: float
    step: int
    """Learner steps done."""
    steps: int
    """Learner steps to do."""
    version: int
    """Newest weights published."""
    target_workers: int
    """Rollout workers that there should be."""
    components: tuple[ComponentStatus, ...] = ()
    store: StoreStatus | None = None
    """None until the store has been asked."""
    rates: Mapping[str, Any] = field(default_factory=dict)
    """Metrics of the newest learner step, by their keys in metrics.jsonl."""
    last_error: str = ""
    """The last thing that went wrong anywhere."""


def write(path: Path, status: RunStatus) -> None:
    """Replace the file at ``path``; numbers that JSON does not have become null."""
    text = json.dumps(_finite(to_json(status)), ensure_ascii=False, allow_nan=False)
    with suppress(OSError):  # a full disk is shown by the run itself, and must not end it
        write_whole(path, text + "\n")


def read(path: Path) -> RunStatus | None:
    """What the run said last; None if it never did. ``ConfigError`` if the file says something else."""
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise ConfigError(
            f"{path} is not what this version of r2vpo writes ({type(error).__name__}: {error}); look with the version "
            "that runs the run"
        ) from None


def to_json(status: RunStatus) -> dict[str, Any]:
    """The status as nested mappings and lists."""
    return asdict(status)


def from_json(value: Mapping[str, Any]) -> RunStatus:
    """The status that ``to_json`` gave. ``TypeError`` or ``KeyError`` if it is none."""
    store = value["store"]
    fields = {
        **value,
        "components": tuple(ComponentStatus(**component) for component in value["components"]),
        "store": store
        and StoreStatus(
            **store | {"troubles": tuple(store["troubles"]), "waits": tuple(Wait(**wait) for wait in store["waits"])}
        ),
    }
    return RunStatus(**fields)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
