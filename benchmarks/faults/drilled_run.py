"""A run, and what is done to it: one fault after the other, each once the one before is cured."""

from __future__ import annotations

import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.faults.moments import await_phase
from benchmarks.faults.outcomes import DrilledRunResult, Outcome
from benchmarks.faults.roles import ENGINE, KILL, ROLES, STOP, Drill
from benchmarks.faults.watch import Late, await_more_steps, await_printed, await_that, status
from learner.checkpoint import complete
from replay.audit import Violation
from replay.schema import CONSUMPTION_FILE
from tests.faults.victims import Run

MOST_STEPS = 160
LAST_STEPS = 15
"""So near its target a run takes no further drill (learner steps)."""
REPLACEMENT_STEPS = 50
"""The same for the death of a worker, whose successor is to be seen."""
MOST_S = 480.0
"""So long after its start a run takes no further drill (seconds): a command that is stopped loses a run at most."""
PAUSE_S = 6.0
"""How long a stopped driver stays so: nobody watches it but a person (seconds)."""
WORKERS = ("rollout worker", ENGINE)
SETTINGS = (
    "rollout.workers=2",
    "replay.shards=2",
    "task.eval_prompts=32",
    "learner.checkpoint_every=5",
    "supervisor.silent_s=20",
    "supervisor.probe_every_s=5",
    "supervisor.backoff_s=0.5",
    "supervisor.max_restarts=50",
    # What restarts wait for grows with their number: each drill is to meet a part that was well for long.
    "supervisor.window_s=20",
)


def drilled(folder: Path, drills: Sequence[Drill]) -> DrilledRunResult:
    """What a run in ``folder`` shows, with as many of the drills as it has room for, the first at least."""
    return _DrilledRun(folder, drills).see()


class _DrilledRun:
    """Construct it to start the run; ``see`` once."""

    def __init__(self, folder: Path, drills: Sequence[Drill]) -> None:
        self._folder, self._drills = folder, drills
        # Engines with a process of their own are slower on a small machine; all drills of a run want them, or none.
        self._has_engine_process = drills[0].role == ENGINE
        self._steps = min(MOST_STEPS, 80 + 40 * len(drills))
        self._result = DrilledRunResult()
        self._began_s = time.monotonic()
        self._run = self._start()
        self._cold_s = 0.0

    def see(self) -> DrilledRunResult:
        result = self._result
        try:
            self._await_first_weights()
            await_more_steps(self._run, 2)
            for drill in self._drills:
                if result.outcomes and not self._has_room(drill):
                    break
                outcome = Outcome(drill=drill)
                result.outcomes.append(outcome)
                self._do(outcome, random.Random(f"{drill}"))
            self._see_the_end()
        except (Late, AssertionError) as failure:
            say(str(failure))
            if not result.outcomes:  # it has not even begun
                result.outcomes.append(Outcome(drill=self._drills[0]))
            self._give_up()
        result.took_s = round(time.monotonic() - self._began_s, 1)
        return result

    def _start(self, *more: str) -> Run:
        settings = (*SETTINGS, f"learner.steps={self._steps}", *more)
        return Run(self._folder, *settings, engine_process=self._has_engine_process)

    def _has_room(self, drill: Drill) -> bool:
        left = self._steps - len(self._run.steps())
        needed = REPLACEMENT_STEPS if drill.role in WORKERS else LAST_STEPS
        return left > needed and time.monotonic() - self._began_s < MOST_S

    def _await_first_weights(self) -> None:
        began_s = await_printed(self._run, r"\d engines?\b")
        here_s = await_that(self._run, "first weights", lambda: bool(self._proven()))
        self._cold_s = here_s - began_s

    def _do(self, outcome: Outcome, rng: random.Random) -> None:
        """The fault, and its cure. ``Late`` if it does not come, ``AssertionError`` if the run ends by it."""
        run, drill = self._run, outcome.drill
        role, by = ROLES[drill.role], signal.Signals[drill.by]
        outcome.in_phase = await_phase(run, drill.phase, rng)
        assert run.exit_code is None, f"the run has ended: {run.printed()[-2000:]}"
        run.look()
        victims = [run.family[0]] if role.title == "driver" else run.titled(role.title)
        assert victims, f"{drill.name}: no process is called {role.title}: {run.printed()[-1000:]}"
        victim = rng.choice(victims)
        said, workers = len(run.printed()), self._workers()
        outcome.step = len(run.steps())
        kept = max(complete(run.folder / "checkpoints"), default=0)
        began_s = time.time()
        victim.send_signal(by)
        say(f"step {outcome.step}: {drill.name}, seed {drill.seed}{'' if outcome.in_phase else ' (phase not seen)'}")
        if drill.role == "driver" and by == STOP:
            time.sleep(PAUSE_S)
            victim.send_signal(signal.SIGCONT)
        elif role.may_end_run:
            self._await_end_or_steps()
        elif role.cure is not None:
            await_printed(run, role.cure, since=said)
        if drill.role in WORKERS:
            self._await_successor(outcome, began_s, workers)
        if drill.role == "learner rank":
            back = int(re.findall(r"the learner group is back at step (\d+)", run.printed())[-1])
            outcome.steps_lost, outcome.steps_redone = max(kept - back, 0), max(outcome.step - back, 0)
        if self._run.exit_code is None:
            await_more_steps(self._run, 2)
        assert self._run.exit_code in (None, 0), f"{drill.name} ended the run: {self._run.printed()[-2000:]}"
        outcome.went_on, outcome.cured_s = True, round(time.time() - began_s, 1)
        say(f"cured after {outcome.cured_s:.0f} s")

    def _await_end_or_steps(self) -> None:
        """The run goes on, or it ends and is resumed."""
        with suppress(Late):
            await_more_steps(self._run, 8)
        if self._run.exit_code not in (None, 0):
            self._run.end()
            self._run = self._start("--resume")
            await_more_steps(self._run, 1)

    def _await_successor(self, outcome: Outcome, began_s: float, known: set[str]) -> None:
        """Death to proven weights; a worker that was stopped counts as dead only once it has been silent for long."""
        here_s = await_that(self._run, "replacement", lambda: bool(self._proven() - known))
        if outcome.drill.by == KILL.name and self._proven() - known:
            outcome.replaced = (here_s - began_s) / self._cold_s
            stepped = len(self._run.steps()) - outcome.step
            outcome.stepped_meanwhile = stepped > 0
            say(
                f"replaced after {here_s - began_s:.1f} s, the first start took {self._cold_s:.1f} s; "
                f"{stepped} learner steps meanwhile"
            )

    def _see_the_end(self) -> None:
        code, output = self._run.end()
        audit = self._run.audit()
        self._count(audit.violations)
        is_there = self._run.steps() == list(range(self._steps)) and audit.version == self._steps
        self._result.has_ended = code == 0 and is_there
        if not self._result.has_ended:
            say(f"exit code {code} after {len(self._run.steps())} steps: {output[-3000:]}")

    def _give_up(self) -> None:
        """End what is left; what the store holds is audited all the same."""
        if self._run.exit_code is None:
            self._run.look()
        for process in self._run.family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._run.end()
        if (self._run.folder / "replay" / CONSUMPTION_FILE).exists():
            self._count(self._run.audit().violations)

    def _count(self, violations: Sequence[Violation]) -> None:
        self._result.violations = dict(Counter(violation.rule for violation in violations))
        for violation in violations:
            say(f"{violation.rule}: {violation.sentence}")

    def _workers(self) -> set[str]:
        return {worker["name"] for worker in status(self._run, role="rollout")}

    def _proven(self) -> set[str]:
        """Workers that have loaded weights and passed the canary."""
        return {w["name"] for w in status(self._run, role="rollout") if w["version"] is not None}


def say(sentence: str) -> None:
    """Progress, on standard error."""
    print(f"drills: {time.strftime('%H:%M:%S')} {sentence}", file=sys.stderr, flush=True)
