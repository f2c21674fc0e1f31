"""What a person sees while a run goes on: a live picture on a terminal, plain lines everywhere else.

    driver ── phase, evaluation, step, note, finish ──▶ RichView  (terminal)
                                                    └─▶ PlainView (pipe, file, CI)

Both say the same; the metrics' keys are those of metrics.jsonl.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from r2vpo.job.config import RunConfig

Metrics = Mapping[str, Any]
ACCENT = "cyan"
PLAIN_EVERY_S = 2.0
RECENT_STEPS = 20
TREND_WIDTH = 28
GAUGE_WIDTH = 20
BLOCKS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """What the driver tells about a run. A context manager: leaving it gives the terminal back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def phase(self, text: str) -> None:
        """A part of the start or the end begins, such as ``engine 1 of 1: loading``; the one before it is over."""
        ...

    def evaluation(self, label: str, accuracy: float, greedy: float, num_prompts: int) -> None:
        """An evaluation is done: accuracy sampled at the training temperature, and greedy beside it."""
        ...

    def step(self, metrics: Metrics, step: int, total: int) -> None:
        """Learner step ``step`` (1-based) of ``total`` is done."""
        ...

    def note(self, text: str) -> None:
        """Something a person should know, in one sentence."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is over; ``summary`` is what summary.json holds."""
        ...


def make_view(config: RunConfig, run_path: Path, *, console: Console | None = None) -> View:
    """A live view where the output is a terminal, plain lines elsewhere."""
    console = console or Console()
    if console.is_terminal and not console.is_dumb_terminal:
        return RichView(config, run_path, console=console)
    return PlainView(config, run_path, out=console.file)


class Progress:
    """What both views remember of the steps so far."""

    def __init__(self, config: RunConfig, clock: Callable[[], float]) -> None:
        self.config = config
        self.clock = clock
        self.metrics: Metrics = {}
        self.step = 0
        self.total = config.learner.steps
        self.rewards: list[float] = []
        self.accuracies: list[tuple[str, float]] = []
        self.started_s: float | None = None
        self._ends_s: list[float] = []

    def begin(self) -> None:
        """The training loop begins: the clock of the steps runs from here."""
        if self.started_s is None:
            self.started_s = self.clock()
            self._ends_s = [self.started_s]

    def add(self, metrics: Metrics, step: int, total: int) -> None:
        """Take in a finished step."""
        self.begin()
        self._ends_s = [*self._ends_s[-RECENT_STEPS:], self.clock()]
        self.metrics, self.step, self.total = metrics, step, total
        reward = number(metrics, "train/reward_mean")
        if reward is not None:
            self.rewards = [*self.rewards, reward]
        accuracy = number(metrics, "eval/accuracy")
        if accuracy is not None:
            self.accuracies = [*self.accuracies, (f"step {step}", accuracy)]

    @property
    def elapsed_s(self) -> float:
        """Seconds since the training loop began."""
        return 0.0 if self.started_s is None else self.clock() - self.started_s

    @property
    def left_s(self) -> float | None:
        """Seconds that the remaining steps will take at the pace of the last ones; None before the second step."""
        steps = len(self._ends_s) - 1
        if steps < 2:
            return None
        return (self._ends_s[-1] - self._ends_s[0]) / steps * (self.total - self.step)

    @property
    def has_budget(self) -> bool:
        """Whether δ bounds V in this run."""
        return self.config.algorithm.name == "r2vpo" or self.config.algorithm.controls_step


class PlainView:
    """One line per event, and one per step but not more than one every two seconds."""

    def __init__(
        self,
        config: RunConfig,
        run_path: Path,
        *,
        out: TextIO | Any = None,
        clock: Callable[[], float] = time.monotonic,
        every_s: float = PLAIN_EVERY_S,
    ) -> None:
        self.progress = Progress(config, clock)
        self._config = config
        self._run_path = run_path
        self._out = out or sys.stdout
        self._every_s = every_s
        self._said_s = -math.inf
        self._born_s = clock()

    def __enter__(self) -> Self:
        self._say(f"R²VPO run {self._config.name}: {describe(self._config)}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass

    def phase(self, text: str) -> None:
        """See ``View.phase``."""
        self._say(f"[{clock_text(self.progress.clock() - self._born_s)}] {text}")

    def evaluation(self, label: str, accuracy: float, greedy: float, num_prompts: int) -> None:
        """See ``View.evaluation``."""
        self.progress.accuracies = [*self.progress.accuracies, (label, accuracy)]
        self._say(evaluation_text(label, accuracy, greedy, num_prompts))

    def step(self, metrics: Metrics, step: int, total: int) -> None:
        """See ``View.step``."""
        self.progress.add(metrics, step, total)
        now_s = self.progress.clock()
        if now_s - self._said_s >= self._every_s or step == total:
            self._said_s = now_s
            self._say(step_text(self.progress))

    def note(self, text: str) -> None:
        """See ``View.note``."""
        self._say(f"note: {text}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See ``View.finish``."""
        self._say(title_text(summary))
        for label, text in result_rows(summary, self._config):
            self._say(f"  {label:<10} {text}")
        self._say(f"in {near_path(self._run_path)}:")
        for name, text in folder_rows(self._run_path):
            self._say(f"  {name:<15} {text}")
        self._say(f"go on: {resume_command(self._run_path, summary)}")

    def _say(self, text: str) -> None:
        print(text, file=self._out, flush=True)


class RichView:
    """A live picture of the run, redrawn several times a second, below the lines that stay."""

    def __init__(
        self,
        config: RunConfig,
        run_path: Path,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.progress = Progress(config, clock)
        self._config = config
        self._run_path = run_path
        self._console = console or Console()
        self._phase: tuple[str, float] | None = None
        self._spinner = Spinner("dots", style=ACCENT)
        self._live = Live(
            console=self._console, get_renderable=self.render, refresh_per_second=8, transient=True, screen=False
        )

    def __enter__(self) -> Self:
        heading = Text.assemble(("R²VPO", f"bold {ACCENT}"), "  ", (self._config.name, "bold"))
        self._console.print(heading, Text(describe(self._config), style="dim"), sep="   ")
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close_phase(done=error is None)
        self._live.stop()

    def phase(self, text: str) -> None:
        """See ``View.phase``."""
        self._close_phase()
        self._phase = (text, self.progress.clock())
        self._live.refresh()

    def evaluation(self, label: str, accuracy: float, greedy: float, num_prompts: int) -> None:
        """See ``View.evaluation``."""
        self._close_phase()
        self.progress.accuracies = [*self.progress.accuracies, (label, accuracy)]
        line = evaluation_text(label, accuracy, greedy, num_prompts)
        self._console.print(Text.assemble(("● ", ACCENT), (line, "bold")))

    def step(self, metrics: Metrics, step: int, total: int) -> None:
        """See ``View.step``."""
        self._close_phase()
        self.progress.add(metrics, step, total)

    def note(self, text: str) -> None:
        """See ``View.note``."""
        self._console.print(Text.assemble(("! ", "bold yellow"), text))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See ``View.finish``."""
        self._close_phase()
        self._live.stop()
        self._console.print(self._closing(summary))

    def _close_phase(self, *, done: bool = True) -> None:
        """The current phase becomes a line that stays, with what it took."""
        if self._phase is None:
            return
        (text, began_s), self._phase = self._phase, None
        mark = ("✓ ", "green") if done else ("✗ ", "red")
        took = f"{self.progress.clock() - began_s:6.1f} s"
        self._console.print(Text.assemble(mark, f"{text:<44}", (took, "dim")))

    def render(self) -> RenderableType:
        """The picture as it is now."""
        parts: list[RenderableType] = []
        if self.progress.step:
            parts.append(self._panel())
        if self._phase is not None:
            text, began_s = self._phase
            self._spinner.update(text=Text(f"{text}  {self.progress.clock() - began_s:.0f} s"))
            parts.append(self._spinner)
        return Group(*parts)

    def _panel(self) -> Panel:
        seen = self.progress
        left = "" if seen.left_s is None else f" · {clock_text(seen.left_s)} left"
        bar = ProgressBar(total=seen.total, completed=seen.step, complete_style=ACCENT, finished_style="green")
        return Panel(
            Group(Padding(bar, (0, 0, 1, 0)), self._readings()),
            title=Text.assemble((f"step {seen.step} of {seen.total}", "bold"), f" · {clock_text(seen.elapsed_s)}{left}"),
            title_align="left",
            border_style="dim",
            width=min(self._console.width, 100),
            padding=(0, 1),
        )

    def _readings(self) -> Table:
        """Labels and values, in two columns where there is room."""
        rows = [*zip(self._learning_rows(), self._machine_rows(), strict=True)]
        wide = self._console.width >= 84
        grid = Table.grid(padding=(0, 2))
        for _ in range(4 if wide else 2):
            grid.add_column(no_wrap=True)
        cells = [[*left, *right] for left, right in rows] if wide else [[*row] for pair in zip(*rows, strict=True) for row in pair]
        for row in cells:
            grid.add_row(*(Text(cell, style="dim") if isinstance(cell, str) else cell for cell in row))
        return grid

    def _learning_rows(self) -> list[tuple[str, Text]]:
        seen, metrics = self.progress, self.progress.metrics
        first, last = (seen.accuracies[0], seen.accuracies[-1]) if seen.accuracies else (None, None)
        accuracy = Text("–")
        if first and last:
            accuracy = Text(f"{first[1]:.3f}", style="" if last is not first else "bold")
            if last is not first:
                accuracy = Text.assemble(f"{first[1]:.3f} → ", (f"{last[1]:.3f}", "bold green"), (f"  {last[0]}", "dim"))
        reward = f"{shown(number(metrics, 'train/reward_mean'), '.3f'):<8}"
        budget = seen.config.algorithm.delta if seen.has_budget else None
        scale = f"{shown(number(metrics, 'control/scale'), '.2f')}×"
        return [
            ("reward", Text.assemble((reward, "bold"), (sparkline(seen.rewards, TREND_WIDTH), ACCENT))),
            ("accuracy", accuracy),
            ("V", budget_text(number(metrics, "dual/second_moment"), budget)),
            ("λ", self._multiplier()),
            ("step scale", Text.assemble(f"{scale:<8}", (f"lr {shown(number(metrics, 'step/lr'), '.1e')}", "dim"))),
        ]

    def _multiplier(self) -> Text:
        metrics, algorithm = self.progress.metrics, self._config.algorithm
        if algorithm.name != "r2vpo":
            return Text("–")
        bounds = f"{algorithm.lambda_min:g} … {algorithm.lambda_max:g}" if algorithm.dual == "bounded" else "fixed"
        ceiling = "  at its ceiling" if number(metrics, "dual/saturated") else ""
        value = f"{shown(number(metrics, 'dual/lambda'), '.2f'):<8}"
        return Text.assemble(value, (bounds, "dim"), (ceiling, "yellow"))

    def _machine_rows(self) -> list[tuple[str, Text]]:
        metrics = self.progress.metrics
        lag = f"{shown(number(metrics, 'train/lag_mean'), '.1f')} mean, {shown(number(metrics, 'train/lag_max'), '.0f')} max"
        idle = f"learner {percent(learner_idle(metrics))}, rollout {percent(number(metrics, 'rollout/idle_fraction'))}"
        return [
            ("lag", Text(lag)),
            ("stale", Text(f"{percent(stale_share(metrics))} of tokens")),
            ("speed", Text(f"{thousands(number(metrics, 'rollout/tokens_per_s'))} tokens/s")),
            ("sync pause", Text(milliseconds(number(metrics, "sync/pause_s")))),
            ("idle", Text(idle)),
        ]

    def _closing(self, summary: Mapping[str, Any]) -> Panel:
        results = Table.grid(padding=(0, 2))
        for label, text in result_rows(summary, self._config):
            results.add_row(Text(label, style="dim"), Text(text, style="bold" if label == "accuracy" else ""))
        rewards = self.progress.rewards
        if rewards:
            trend = Text.assemble((sparkline(rewards, 2 * TREND_WIDTH), ACCENT), f" {rewards[-1]:.3f}")
            results.add_row(Text("reward", style="dim"), trend)
        folders = Table.grid(padding=(0, 2))
        for name, text in folder_rows(self._run_path):
            folders.add_row(Text(f"  {name}", style=ACCENT), Text(text, style="dim"))
        go_on = Text.assemble(("go on  ", "dim"), resume_command(self._run_path, summary))
        good = summary.get("status") == "finished"
        return Panel(
            Group(results, Text(), Text(near_path(self._run_path), style=ACCENT), folders, Text(), go_on),
            title=Text(title_text(summary), style="bold green" if good else "bold yellow"),
            title_align="left",
            border_style="green" if good else "yellow",
            width=min(self._console.width, 100),
            padding=(1, 2),
        )


def describe(config: RunConfig) -> str:
    """A run in one line: ``r2vpo on arithmetic, quickstart-model, 1 rollout worker, 1 learner rank``."""
    workers, ranks = config.rollout.workers, config.learner.ranks
    return (
        f"{config.algorithm.name} on {config.task.name}, {Path(config.model.path).name}, "
        f"{workers} rollout worker{'s' * (workers != 1)}, {ranks} learner rank{'s' * (ranks != 1)}"
    )


def evaluation_text(label: str, accuracy: float, greedy: float, num_prompts: int) -> str:
    """An evaluation in one line."""
    return f"accuracy {label}: {accuracy:.3f} sampled, {greedy:.3f} greedy, on {num_prompts} held-out prompts"


def step_text(seen: Progress) -> str:
    """A step in one line."""
    metrics = seen.metrics
    budget = f"/{seen.config.algorithm.delta:g}" if seen.has_budget else ""
    parts = [
        f"step {seen.step:>{len(str(seen.total))}}/{seen.total}",
        f"reward {shown(number(metrics, 'train/reward_mean'), '.3f')}",
        f"V {shown(number(metrics, 'dual/second_moment'), '.4f')}{budget}",
        f"λ {shown(number(metrics, 'dual/lambda'), '.2f')}",
        f"scale {shown(number(metrics, 'control/scale'), '.2f')}",
        f"lag {shown(number(metrics, 'train/lag_mean'), '.1f')} (max {shown(number(metrics, 'train/lag_max'), '.0f')})",
        f"stale {percent(stale_share(metrics))}",
        f"{thousands(number(metrics, 'rollout/tokens_per_s'))} tokens/s",
        f"sync {milliseconds(number(metrics, 'sync/pause_s'))}",
    ]
    accuracy = number(metrics, "eval/accuracy")
    if accuracy is not None:
        parts.insert(2, f"accuracy {accuracy:.3f}")
    if seen.left_s is not None:
        parts.append(f"{clock_text(seen.left_s)} left")
    return "  ".join(parts)


def title_text(summary: Mapping[str, Any]) -> str:
    """The end of a run in one line."""
    return f"{summary['run']}: {summary['status']} after {summary['steps']} steps in {clock_text(summary['wall_s'])}"


def result_rows(summary: Mapping[str, Any], config: RunConfig) -> list[tuple[str, str]]:
    """What the run came to, as label and text."""
    before, after = summary["eval"]["before"], summary["eval"]["after"]
    rows: list[tuple[str, str]] = []
    if before["accuracy"] is not None and after["accuracy"] is not None:
        rows.append(
            (
                "accuracy",
                f"{before['accuracy']:.3f} → {after['accuracy']:.3f} sampled at temperature {config.rollout.temperature:g}, "
                f"{before['greedy']:.3f} → {after['greedy']:.3f} greedy ({after['num_prompts']} held-out prompts)",
            )
        )
    replay, lag, sync = summary["replay"], summary["lag"], summary["sync"]
    rows.append(
        (
            "data",
            f"{summary['rollouts']['trajectories']:,} trajectories; {percent(replay['stale_fraction_trained'])} of the "
            f"trained tokens stale; lag {shown(lag['mean'], '.1f')} mean, {shown(lag['max'], '.0f')} max",
        )
    )
    rows.append(
        (
            "sync",
            f"{sync['count']} weight loads, median pause {milliseconds(sync['pause_s_p50'])}, "
            f"longest {milliseconds(sync['pause_s_max'])}; canary gap {shown(sync['canary_gap_max'], '.0e')} at most",
        )
    )
    return rows


def folder_rows(run_path: Path) -> list[tuple[str, str]]:
    """What lies where, for those parts that exist."""
    what = {
        "model/": "the trained model, Hugging Face format",
        "metrics.jsonl": "one object per step",
        "summary.json": "the result",
        "checkpoints/": "where the run can go on from",
        "replay/": "every trajectory, SQLite",
        "logs/": "engines, Ray, W&B",
    }
    return [(name, text) for name, text in what.items() if (run_path / name).exists()]


def resume_command(run_path: Path, summary: Mapping[str, Any]) -> str:
    """The command that continues the run: with twice the steps where it is finished, as it was where it is not."""
    more = f" learner.steps={2 * summary['steps']}" if summary["status"] == "finished" else ""
    return f"r2vpo train {near_path(run_path)}/config.yaml --resume{more}"


def near_path(path: Path) -> str:
    """A path relative to the current directory where it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def number(metrics: Metrics, key: str) -> float | None:
    """A metric, or None where it is absent or not finite."""
    value = metrics.get(key)
    return float(value) if value is not None and math.isfinite(value) else None


def stale_share(metrics: Metrics) -> float | None:
    """Stale tokens among the trained tokens of a step."""
    stale, tokens = number(metrics, "train/stale_tokens"), number(metrics, "train/tokens")
    return None if stale is None or not tokens else stale / tokens


def learner_idle(metrics: Metrics) -> float | None:
    """Share of a step in which the learner waited for samples."""
    wait_s, step_s = number(metrics, "time/wait_s"), number(metrics, "time/step_s")
    return None if wait_s is None or not step_s else wait_s / step_s


def shown(value: float | None, form: str) -> str:
    """A number in a format, or a dash."""
    return "–" if value is None else format(value, form)


def percent(value: float | None) -> str:
    """``46 %``, or a dash."""
    return "–" if value is None else f"{100 * value:.0f} %"


def thousands(value: float | None) -> str:
    """``12,345``, or a dash."""
    return "–" if value is None else f"{value:,.0f}"


def milliseconds(value_s: float | None) -> str:
    """Seconds as ``21 ms``, or a dash."""
    return "–" if value_s is None else f"{1000 * value_s:.0f} ms"


def clock_text(seconds: float) -> str:
    """``1:02``, or ``1:02:03`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of ``values`` in at most ``width`` blocks, each the mean of its share: ``▁▂▄▆█``."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * index // count for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, span = min(means), max(max(means) - min(means), 1e-9)
    return "".join(BLOCKS[min(int((mean - low) / span * len(BLOCKS)), len(BLOCKS) - 1)] for mean in means)


def budget_text(second_moment: float | None, delta: float | None) -> Text:
    """V as a number and, where δ bounds it, as a gauge from 0 to 2δ with δ in the middle."""
    text = Text()
    text.append(f"{shown(second_moment, '.4f'):<8}", style="bold")
    if second_moment is None or delta is None:
        return text
    share = min(second_moment / (2 * delta), 1.0)
    filled = round(share * GAUGE_WIDTH)
    color = "green" if second_moment <= 1.25 * delta else "yellow" if second_moment <= 2 * delta else "red"
    for cell in range(GAUGE_WIDTH):
        if cell == GAUGE_WIDTH // 2:
            text.append("│", style="bold")
        text.append("━" if cell < filled else "─", style=color if cell < filled else "dim")
    return text.append(f" δ {delta:g}", style="dim")
