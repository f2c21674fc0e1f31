"""The live picture of a run on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from r2vpo.job.config import RunConfig
from r2vpo.job.readings import (
    Metrics,
    Progress,
    clock_text,
    describe,
    evaluation_text,
    folder_rows,
    learner_idle,
    milliseconds,
    near_path,
    number,
    percent,
    result_rows,
    resume_command,
    shown,
    sparkline,
    stale_share,
    thousands,
    title_text,
)

ACCENT = "cyan"
TREND_WIDTH = 28
GAUGE_WIDTH = 20


class LiveView:
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
        self.progress.mark()
        self._phase = (text, self.progress.clock())
        self._live.refresh()

    def evaluation(self, label: str, accuracy: float, greedy: float, num_prompts: int) -> None:
        """See ``View.evaluation``."""
        self._close_phase()
        self.progress.evaluated(label, accuracy)
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
        command = Text(resume_command(self._run_path, summary), style="bold")
        self._console.print(Text("go on:", style="dim"), command, soft_wrap=True)  # whole, so that it can be copied

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
            title=Text.assemble(
                (f"step {seen.step} of {seen.total}", "bold"), f" · {clock_text(seen.elapsed_s)}{left}"
            ),
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
        cells = (
            [[*left, *right] for left, right in rows]
            if wide
            else [[*row] for pair in zip(*rows, strict=True) for row in pair]
        )
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
                accuracy = Text.assemble(
                    f"{first[1]:.3f} → ", (f"{last[1]:.3f}", "bold green"), (f"  {last[0]}", "dim")
                )
        reward = f"{shown(number(metrics, 'train/reward_mean'), '.3f'):<8}"
        scale = f"{shown(number(metrics, 'control/scale'), '.2f')}×"
        return [
            ("reward", Text.assemble((reward, "bold"), (sparkline(seen.rewards, TREND_WIDTH), ACCENT))),
            ("accuracy", accuracy),
            ("V", budget_text(number(metrics, "dual/second_moment"), seen.budget)),
            ("λ", self._multiplier()),
            ("step scale", Text.assemble(f"{scale:<8}", (f"lr {shown(number(metrics, 'step/lr'), '.1e')}", "dim"))),
        ]

    def _multiplier(self) -> Text:
        metrics, algorithm = self.progress.metrics, self._config.algorithm
        if not algorithm.has_multiplier:
            return Text("–")
        bounds = f"{algorithm.lambda_min:g} … {algorithm.lambda_max:g}" if algorithm.dual == "bounded" else "fixed"
        ceiling = "  at its ceiling" if number(metrics, "dual/saturated") else ""
        value = f"{shown(number(metrics, 'dual/lambda'), '.2f'):<8}"
        return Text.assemble(value, (bounds, "dim"), (ceiling, "yellow"))

    def _machine_rows(self) -> list[tuple[str, Text]]:
        metrics = self.progress.metrics
        lag_mean, lag_max = number(metrics, "train/lag_mean"), number(metrics, "train/lag_max")
        lag = f"{shown(lag_mean, '.1f')} mean, {shown(lag_max, '.0f')} max"
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
        good = summary.get("status") == "finished"
        return Panel(
            Group(results, Text(), Text(near_path(self._run_path), style=ACCENT), folders),
            title=Text(title_text(summary), style="bold green" if good else "bold yellow"),
            title_align="left",
            border_style="green" if good else "yellow",
            width=min(self._console.width, 100),
            padding=(1, 2),
        )


def budget_text(second_moment: float | None, budget: float | None) -> Text:
    """V as a number and, where a budget δ̂ bounds it, as a gauge from 0 to 2δ̂ with δ̂ in the middle."""
    text = Text()
    text.append(f"{shown(second_moment, '.4f'):<8}", style="bold")
    if second_moment is None or not budget:
        return text
    share = min(second_moment / (2 * budget), 1.0)
    filled = round(share * GAUGE_WIDTH)
    color = "green" if second_moment <= 1.25 * budget else "yellow" if second_moment <= 2 * budget else "red"
    for cell in range(GAUGE_WIDTH):
        if cell == GAUGE_WIDTH // 2:
            text.append("│", style="bold")
        text.append("━" if cell < filled else "─", style=color if cell < filled else "dim")
    return text.append(f" of {budget:.2g}", style="dim")
