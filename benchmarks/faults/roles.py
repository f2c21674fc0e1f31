"""What is drilled: who dies, in which phases, by which signal."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.faults.moments import APPEND, BACKWARD, CHECKPOINT, GENERATION, LOAD, SAMPLING

KILL, STOP = signal.SIGKILL, signal.SIGSTOP


@dataclass(frozen=True, kw_only=True)
class Role:
    """Who dies."""

    title: str
    """Part of its command line; ``driver`` is the command itself."""
    phases: tuple[str, ...]
    """In which it has a part."""
    cure: str | None = None
    """What the run says when it is dealt with; None: nothing, it only goes on."""
    may_end_run: bool = False
    """Whether the run may end with it, for ``--resume`` to go on."""


ENGINE = "engine"
_REPLACED = r"note: rollout-\d+ .*; replacing it"
_AGAIN = "starting all processes again, from step"
ROLES = {
    "rollout worker": Role(title="ray::RolloutActor", phases=(GENERATION, APPEND, LOAD), cure=_REPLACED),
    ENGINE: Role(title="VLLM::EngineCore", phases=(GENERATION, LOAD), cure=_REPLACED),
    "learner rank": Role(
        title="ray::LearnerRank", phases=(BACKWARD, CHECKPOINT, SAMPLING), cure="the learner group is back at step"
    ),
    "replay shard": Role(
        title="ray::ShardHost", phases=(APPEND, SAMPLING, BACKWARD), cure=r"note: replay shard \d is back after"
    ),
    "replay actor": Role(title="ray::ReplayService", phases=(SAMPLING, APPEND, CHECKPOINT), cure=_AGAIN),
    "weight board": Role(title="ray::WeightBoard", phases=(LOAD, BACKWARD), cure=_AGAIN),
    "reward process": Role(title="rollout.reward_process", phases=(GENERATION, APPEND)),
    "reward guard": Role(title="rollout.reward_guard", phases=(GENERATION,)),
    "driver": Role(title="driver", phases=(SAMPLING, BACKWARD, CHECKPOINT, LOAD), may_end_run=True),
    "raylet": Role(title="raylet/raylet", phases=(GENERATION, BACKWARD), may_end_run=True),
}


@dataclass(frozen=True, kw_only=True)
class Drill:
    """One fault."""

    role: str
    phase: str
    by: str
    """Name of the signal."""
    seed: int

    @property
    def name(self) -> str:
        """Without the seed."""
        return f"{self.by} of the {self.role} at {self.phase}"


IN_QUICK = tuple(
    Drill(role=role, phase=phase, by=by.name, seed=0)
    for role, phase, by in (
        ("rollout worker", GENERATION, KILL),
        ("replay shard", APPEND, KILL),
        ("learner rank", CHECKPOINT, KILL),
        ("reward process", GENERATION, STOP),
        ("rollout worker", LOAD, STOP),
        ("replay actor", SAMPLING, KILL),
        ("driver", BACKWARD, KILL),
    )
)


def all_drills(seeds: Iterable[int]) -> list[Drill]:
    """Role × phase × signal × seed, in an order that is drawn: what comes after what differs from seed to seed."""
    drills: list[Drill] = []
    for seed in seeds:
        of_seed = [
            Drill(role=role, phase=phase, by=by.name, seed=seed)
            for role, about in ROLES.items()
            for phase in about.phases
            for by in (KILL, STOP)
        ]
        random.Random(seed).shuffle(of_seed)
        drills += of_seed
    return drills
