"""Drills: every process of a run is killed or stopped in every phase in which it has a part, and the run must go on.

    queue of drills ──▶ a run of the quickstart with two workers and two shards ──▶ its end, audited
         ▲                  │ one fault after the other, each once the one before is cured
         └── what is left ──┘

A run takes drills until it nears its target step, since a start costs more than a fault. Moments are drawn by a seed.
Times are ratios within one run: a replacement against the first start of an engine in the same run.
"""

from __future__ import annotations

import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

from benchmarks.faults.moments import APPEND, BACKWARD, CHECKPOINT, GENERATION, LOAD, SAMPLING, await_phase
from benchmarks.faults.watch import Late, await_more_steps, await_printed, await_that, status
from benchmarks.table import QUICK, Row, at_least, at_most, emit, reported
from learner.checkpoint import complete
from replay.audit import ACKNOWLEDGED
from tests.faults.victims import Run

KILL, STOP = signal.SIGKILL, signal.SIGSTOP
STEPS = 160
LAST_STEPS = 15
"""So near its target a run takes no further drill (learner steps)."""
PAUSE_S = 6.0
"""How long a stopped driver stays so: nobody watches it but a person (seconds)."""
SETTINGS = (
    "rollout.workers=2",
    "replay.shards=2",
    "task.eval_prompts=32",
    f"learner.steps={STEPS}",
    "learner.checkpoint_every=5",
    "supervisor.silent_s=30",
    "supervisor.probe_every_s=5",
    "supervisor.backoff_s=0.5",
    "supervisor.max_restarts=50",
)


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


_REPLACED = r"note: rollout-\d+ .*; replacing it"
_AGAIN = "starting all processes again, from step"
ROLES = {
    "rollout worker": Role(title="ray::RolloutActor", phases=(GENERATION, APPEND, LOAD), cure=_REPLACED),
    "engine": Role(title="VLLM::EngineCore", phases=(GENERATION, LOAD), cure=_REPLACED),
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
IN_QUICK = (
    ("rollout worker", GENERATION, KILL),
    ("replay shard", APPEND, KILL),
    ("learner rank", CHECKPOINT, KILL),
    ("reward process", GENERATION, STOP),
    ("rollout worker", LOAD, STOP),
    ("replay actor", SAMPLING, KILL),
    ("driver", BACKWARD, KILL),
)


@dataclass(frozen=True, kw_only=True)
class Drill:
    """One fault."""

    role: str
    phase: str
    by: signal.Signals
    seed: int

    @property
    def name(self) -> str:
        """Without the seed."""
        return f"{self.by.name} of the {self.role} at {self.phase}"


@dataclass
class Findings:
    """What all runs have shown."""

    runs: int = 0
    ended: int = 0
    """Runs that reached their target step with exit code 0."""
    violations: Counter[str] = field(default_factory=Counter)
    """By the audit's rule."""
    survived: dict[str, list[bool]] = field(default_factory=dict)
    """Drill without its seed → whether the run went on."""
    in_phase: list[bool] = field(default_factory=list)
    """Of every drill, whether its phase was seen when it came."""
    replaced: list[float] = field(default_factory=list)
    """Seconds from a worker's death to its successor's weights, by those of the first start in the same run."""
    stepped_meanwhile: list[bool] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)
    """Learner steps that a learner's death undid, of those that a checkpoint held."""
    steps_redone: list[int] = field(default_factory=list)
    """Learner steps that it undid in all."""


def all_drills(seeds: int) -> list[Drill]:
    """Role × phase × signal × seed, in an order that is drawn: what comes after what differs from seed to seed."""
    drills: list[Drill] = []
    for seed in range(seeds):
        of_seed = [
            Drill(role=role, phase=phase, by=by, seed=seed)
            for role, about in ROLES.items()
            for phase in about.phases
            for by in (KILL, STOP)
        ]
        random.Random(seed).shuffle(of_seed)
        drills += of_seed
    return drills


def measure(drills: Sequence[Drill]) -> Iterator[Row]:
    findings = Findings()
    # Engines with a process of their own are slower on a small machine, and are not what the other drills are about.
    for has_process in (False, True):
        left = [drill for drill in drills if (drill.role == "engine") == has_process]
        while left:
            with tempfile.TemporaryDirectory(prefix="r2vpo-bench-") as folder:
                taken = DrilledRun(Path(folder), findings, engine_process=has_process).take(left)
            left = left[max(taken, 1) :]
    yield from figures(findings)


class DrilledRun:
    """A run, and what is done to it."""

    def __init__(self, folder: Path, findings: Findings, *, engine_process: bool) -> None:
        self._folder, self._findings, self._engine_process = folder, findings, engine_process
        self._run = self._start()
        self._cold_s = 0.0

    def _start(self, *more: str) -> Run:
        return Run(self._folder, *SETTINGS, *more, engine_process=self._engine_process)

    def take(self, drills: Sequence[Drill]) -> int:
        """Do as many of them as one run has room for, and see it to its end; returns how many."""
        taken, found = 0, self._findings
        found.runs += 1
        try:
            self._await_first_weights()
            await_more_steps(self._run, 2)
            while taken < len(drills) and len(self._run.steps()) < STEPS - LAST_STEPS:
                drill, taken = drills[taken], taken + 1
                found.survived.setdefault(drill.name, []).append(False)
                self._do(drill, random.Random(f"{drill}"))
                found.survived[drill.name][-1] = True
            self._see_the_end()
        except (Late, AssertionError) as failure:
            print(f"drills: {failure}", file=sys.stderr)
            self._give_up()
        return taken

    def _await_first_weights(self) -> None:
        began_s = await_printed(self._run, r"\d engines?\b")
        here_s = await_that(self._run, "first weights", lambda: bool(self._proven()))
        self._cold_s = here_s - began_s

    def _do(self, drill: Drill, rng: random.Random) -> None:
        """The fault, and its cure. ``Late`` if it does not come, ``AssertionError`` if the run ends by it."""
        run, role = self._run, ROLES[drill.role]
        is_seen = await_phase(run, drill.phase, rng)
        assert run.exit_code is None, f"the run has ended: {run.printed()[-2000:]}"
        self._findings.in_phase.append(is_seen)
        run.look()
        victims = [run.family[0]] if role.title == "driver" else run.titled(role.title)
        assert victims, f"{drill.name}: no process is called {role.title}: {run.printed()[-1000:]}"
        victim = rng.choice(victims)
        said, step, workers = len(run.printed()), len(run.steps()), self._workers()
        kept = max(complete(run.folder / "checkpoints"), default=0)
        began_s = time.time()
        victim.send_signal(drill.by)
        print(f"drills: step {step}: {drill.name}{'' if is_seen else ' (not seen)'}", file=sys.stderr)
        if drill.role == "driver" and drill.by == STOP:
            time.sleep(PAUSE_S)
            victim.send_signal(signal.SIGCONT)
        elif role.may_end_run:
            self._await_end_or_steps(victim)
        elif role.cure is not None:
            await_printed(run, role.cure, since=said)
        if drill.role in ("rollout worker", "engine"):
            self._await_successor(drill, began_s, workers, step)
        if drill.role == "learner rank":
            back = int(re.findall(r"the learner group is back at step (\d+)", run.printed())[-1])
            self._findings.steps_lost.append(max(kept - back, 0))
            self._findings.steps_redone.append(max(step - back, 0))
        if self._run.exit_code is None:
            await_more_steps(self._run, 2)
        assert self._run.exit_code in (None, 0), f"{drill.name} ended the run: {self._run.printed()[-2000:]}"
        print(f"drills: cured after {time.time() - began_s:.0f} s", file=sys.stderr)

    def _await_end_or_steps(self, victim: psutil.Process) -> None:
        """The run goes on, or it ends and is resumed."""
        with suppress(Late):
            await_more_steps(self._run, 8)
        if self._run.exit_code is None:
            return
        if self._run.exit_code != 0:
            self._run.end()
            self._run = self._start("--resume")
            await_more_steps(self._run, 1)

    def _await_successor(self, drill: Drill, began_s: float, known: set[str], step: int) -> None:
        """Death to proven weights; a worker that was stopped counts as dead only once it has been silent for long."""
        here_s = await_that(self._run, "replacement", lambda: bool(self._proven() - known))
        if drill.by == KILL and self._proven() - known:
            self._findings.replaced.append((here_s - began_s) / self._cold_s)
            self._findings.stepped_meanwhile.append(len(self._run.steps()) > step)
            print(
                f"drills: replaced after {here_s - began_s:.1f} s, the first start took {self._cold_s:.1f} s; "
                f"{len(self._run.steps()) - step} learner steps meanwhile",
                file=sys.stderr,
            )

    def _see_the_end(self) -> None:
        code, output = self._run.end()
        audit = self._run.audit()
        self._findings.violations.update(violation.rule for violation in audit.violations)
        for violation in audit.violations:
            print(f"drills: {violation.rule}: {violation.sentence}", file=sys.stderr)
        is_there = code == 0 and self._run.steps() == list(range(STEPS)) and audit.version == STEPS
        self._findings.ended += is_there
        if not is_there:
            print(f"drills: exit code {code} after {len(self._run.steps())} steps: {output[-3000:]}", file=sys.stderr)

    def _give_up(self) -> None:
        """End what is left; what the store holds is audited all the same."""
        if self._run.exit_code is None:
            self._run.look()
        for process in self._run.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._run.end()
        self._findings.violations.update(violation.rule for violation in self._run.audit().violations)

    def _workers(self) -> set[str]:
        return {worker["name"] for worker in status(self._run, role="rollout")}

    def _proven(self) -> set[str]:
        """Workers that have loaded weights and passed the canary."""
        return {w["name"] for w in status(self._run, role="rollout") if w["version"] is not None}


def figures(found: Findings) -> Iterator[Row]:
    """Rows of all runs."""
    yield at_least("drills: runs that reach their target step", found.ended / found.runs, "of all", 1.0)
    for name, went_on in sorted(found.survived.items()):
        yield at_least(f"drills: {name}: the run went on", sum(went_on) / len(went_on), f"of {len(went_on)}", 1.0)
    lost, twice = found.violations[ACKNOWLEDGED], found.violations["once"]
    yield at_most("drills: acknowledged groups lost", lost, "groups", 0)
    yield at_most("drills: groups trained twice in a step", twice, "groups", 0)
    yield at_most("drills: other violations", found.violations.total() - lost - twice, "", 0)
    if found.replaced:
        yield at_most("drills: worker killed to successor ready", median(found.replaced), "x cold start", 1.3)
        yield reported("drills: the same, the slowest", max(found.replaced), "x cold start")
        share = sum(found.stepped_meanwhile) / len(found.stepped_meanwhile)
        yield at_least("drills: the learner stepped meanwhile", share, "of these", 1.0)
    if found.steps_lost:
        yield at_most("drills: checkpointed steps undone by a learner's death", max(found.steps_lost), "steps", 0)
        yield reported("drills: steps undone by a learner's death", max(found.steps_redone), "steps at most")
    yield reported("drills: faults", len(found.in_phase), "")
    yield reported("drills: faults whose phase was seen", sum(found.in_phase) / len(found.in_phase), "of all")


if __name__ == "__main__":
    quick = [Drill(role=role, phase=phase, by=by, seed=0) for role, phase, by in IN_QUICK]
    if sys.argv[1:]:  # such as: "rollout worker/append/SIGKILL"
        quick = [
            Drill(role=role, phase=phase, by=signal.Signals[by], seed=0)
            for role, phase, by in (given.split("/") for given in sys.argv[1:])
        ]
        emit(measure(quick))
    else:
        emit(measure(quick if QUICK else all_drills(seeds=3)))
