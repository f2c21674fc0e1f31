"""``r2vpo replay-step RUN --step S``: computes a learner step again from the store, and says whether it is the same.

    run's folder ──▶ StepPlan ──▶ pin ──▶ are all batches there? ──▶ recompute (brings Ray) ──▶ compare ──▶ sentence

The checkpoint is pinned, since a run that goes on removes its older ones. Every step on the way from it is compared, so
that the first one that differs is found.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from learner.checkpoint import pinned
from r2vpo.job.config import RayConfig
from r2vpo.job.differences import Comparison, closing, compare, first_difference, table
from r2vpo.job.find_run import find_run
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError
from r2vpo.job.step_plan import StepPlan, make_plan, removed_meanwhile
from replay.errors import ReplayError
from replay.reader import StoreReader

EXAMPLES = """\
examples:
  r2vpo replay-step quickstart-1 --step 73
  r2vpo replay-step runs/quickstart-1 --step 73 --checkpoint runs/quickstart-1/checkpoints/step-000050 --json

exit code: 0 the same, 1 it differs, 2 it cannot be computed again
"""
SAME, DIFFERENT, INTERRUPTED = 0, 1, 130
LINE_EVERY_S = 5.0
"""Between two lines about steps where the output is no terminal (seconds)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``r2vpo replay-step`` takes."""
    parser.add_argument("run", metavar="RUN", help="folder of a run, or its name in ./runs")
    parser.add_argument("--step", type=_step, required=True, metavar="S", help="the learner step to compute again")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="begin here (…/checkpoints/step-NNNNNN) and not at the run's newest checkpoint at or before S",
    )
    parser.add_argument("--ray-address", metavar="ADDRESS", help="compute on this Ray cluster, not on a private one")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit code: 0 the same, 1 it differs, 130 interrupted.

    ``ConfigError`` if the step cannot be computed again.
    """
    started = time.monotonic()
    folder = RunDir(find_run(arguments.run))
    ray = RayConfig(address=arguments.ray_address)
    plan = make_plan(folder, step=arguments.step, checkpoint=arguments.checkpoint).on(ray)
    with kept(plan) as lasting:
        comparisons, rounding = _compute(folder, lasting, ray)
    if not comparisons:
        return INTERRUPTED
    sentence = closing(comparisons, origin=plan.origin, rounding=rounding)
    if arguments.json:
        result = as_json(plan, comparisons, sentence, rounding)
        print(json.dumps(result | {"seconds": time.monotonic() - started}, indent=2, ensure_ascii=False))
    else:
        show(plan, comparisons, sentence, rounding)
    return SAME if first_difference(comparisons) is None else DIFFERENT


@contextmanager
def kept(plan: StepPlan) -> Iterator[StepPlan]:
    """The same plan from a checkpoint that stays until the context ends.

    ``ConfigError`` if the run removes it before that, or if there is no room for a copy of it.
    """
    if plan.checkpoint is None:
        yield plan
        return
    with ExitStack() as until_done:
        try:
            checkpoint = until_done.enter_context(pinned(plan.checkpoint))
        except ValueError:
            raise removed_meanwhile(plan.checkpoint) from None
        except OSError as error:
            raise ConfigError(
                f"{plan.checkpoint} cannot be linked or copied, so that it stays while it is read: "
                f"{error.strerror or error}; make room in {error.filename2 or error.filename or plan.checkpoint.parent}"
            ) from error
        yield replace(plan, checkpoint=checkpoint)


def _compute(folder: RunDir, plan: StepPlan, ray: RayConfig) -> tuple[list[Comparison], float]:
    """Comparisons of all steps, and the rounding that was allowed for; none if a signal asked to stop."""
    progress = StepProgress()
    with _open(folder) as reader:
        progress.phase(_count(plan))
        check_batches(reader, plan)
        os.environ.update(ray.environment())
        from r2vpo.job.recompute import recompute  # brings Ray: only now

        result = recompute(plan, reader.batch, progress=progress)
    progress.end()
    if result is None:
        return [], 0.0
    return [
        compare(step, recorded=plan.recorded[step], recomputed=metrics, rounding=result.rounding)
        for step, metrics in result.metrics.items()
    ], result.rounding


def check_batches(reader: StoreReader, plan: StepPlan) -> None:
    """Read the batch of every step once, before anything heavy starts.

    ``ConfigError`` names the first step whose groups are not all there, and why.
    """
    for step in plan.steps:
        try:
            reader.batch(step)
        except (ReplayError, LookupError) as error:
            if reader.gaps:
                raise ConfigError(
                    f"{'; '.join(reader.gaps)}; the batch of step {step} has groups there: run this where the files "
                    f"are, or copy them into {reader.directory}"
                ) from error
            raise ConfigError(
                f"{error.args[0]}; step {plan.step} cannot be computed again from {plan.origin} without it: choose "
                "another step, or a later checkpoint with --checkpoint"
            ) from error


def show(plan: StepPlan, comparisons: Sequence[Comparison], sentence: str, rounding: float) -> None:
    """Print the table of the step, the steps on the way that differ, the notes and the closing sentence."""
    print(table(comparisons[-1], width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 200))
    print(f"same: within {rounding:g} relative{_why(rounding)}; counts and the batch exactly")
    for comparison in comparisons[:-1]:
        if not comparison.is_same:
            wrong = comparison.differing
            print(f"step {comparison.step} on the way: {len(wrong)} of {len(comparison.readings)} differ, {wrong[0]}")
    for note in plan.notes:
        print(f"note: {note}")
    print(sentence)


def as_json(plan: StepPlan, comparisons: Sequence[Comparison], sentence: str, rounding: float) -> dict[str, Any]:
    """The result as a JSON object: ``same``, ``metrics`` of the step, ``steps`` on the way, ``notes``, ``says``."""
    wrong = first_difference(comparisons)
    return {
        "step": plan.step,
        "same": wrong is None,
        "origin": str(plan.checkpoint) if plan.checkpoint else None,
        "rounding": rounding,
        "first_difference": wrong and {"step": wrong.step, "metrics": [r.name for r in wrong.differing]},
        "metrics": {
            r.name: {"recorded": r.recorded, "recomputed": r.recomputed, "verdict": r.verdict}
            for r in comparisons[-1].readings
        },
        "steps": [
            {"step": c.step, "same": c.is_same, "identical": c.num_identical, "metrics": len(c.readings)}
            for c in comparisons
        ],
        "notes": list(plan.notes),
        "says": sentence,
    }


class StepProgress:
    """Tells on standard error how far it is: lines, and on a terminal one line that changes."""

    def __init__(self) -> None:
        self._out = sys.stderr
        self._live = self._out.isatty()
        self._told_s = -LINE_EVERY_S
        self._open = False

    def phase(self, text: str) -> None:
        """A part begins."""
        self.end()
        print(f"r2vpo: {text}", file=self._out, flush=True)

    def step(self, step: int, *, done: int, total: int) -> None:
        """The batch of ``step`` is being trained; ``done`` of ``total`` steps are behind."""
        text = f"r2vpo: step {step} ({done + 1} of {total})"
        if self._live:
            print(f"\r\x1b[2K{text}", end="", file=self._out, flush=True)
            self._open = True
        elif time.monotonic() - self._told_s >= LINE_EVERY_S:
            print(text, file=self._out, flush=True)
            self._told_s = time.monotonic()

    def end(self) -> None:
        """Close the line that changes."""
        if self._open:
            print("\r\x1b[2K", end="", file=self._out, flush=True)
            self._open = False


def _step(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not the number of a step, such as 12")
    return int(text)


def _open(run: RunDir) -> StoreReader:
    try:
        return StoreReader(run.replay)
    except ReplayError as error:
        raise ConfigError(str(error)) from error


def _count(plan: StepPlan) -> str:
    steps = plan.steps
    if len(steps) == 1:
        return f"recomputing step {plan.step} from {plan.origin}"
    return f"recomputing {len(steps)} steps, {steps.start} to {plan.step}, from {plan.origin}"


def _why(rounding: float) -> str:
    return " (float32 on a CPU)" if rounding < 1e-3 else " (bfloat16, or a GPU)"
