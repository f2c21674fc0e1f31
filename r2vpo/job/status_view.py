"""What ``r2vpo status`` shows to people: lines of text, coloured and fitted to the width on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.text import Text

from r2vpo.job.readings import (
    clock_text,
    learner_idle,
    milliseconds,
    number,
    percent,
    shown,
    stale_share,
    thousands,
)
from r2vpo.job.replay_view import ACCENT, Column, printable, size_text, table
from r2vpo.job.run_report import FAILED, FINISHED, INTERRUPTED, KILLED, RUNNING, SILENT, STARTING, RunReport
from r2vpo.job.status import ComponentStatus, RunStatus, StoreStatus

LABEL_WIDTH = 13
STATE_STYLES = {
    RUNNING: "green",
    STARTING: "yellow",
    SILENT: "red",
    FINISHED: "green",
    INTERRUPTED: "yellow",
    FAILED: "red",
    KILLED: "red",
}
COMPONENT_STYLES = {
    "serving": "green",
    "starting": "yellow",
    "draining": "yellow",
    "restarting": "red",
    "stopped": "dim",
}


def report_lines(report: RunReport, *, where: str, width: int | None) -> Iterator[Text]:
    """``r2vpo status``; ``where`` is how the user names the run to another command."""
    yield Text.assemble(
        (report.run, f"bold {ACCENT}"), "  ", (report.state, STATE_STYLES[report.state]), f"  {_place(report)}"
    )
    rows = list(_run_rows(report.status, report.now_s) if report.is_alive and report.status else _end_rows(report))
    if report.error:
        rows.append(("last error", report.error))
    rows.append(("next", next_step(report, where)))
    for label, text in rows:
        first, *more = _wrapped(printable(text), None if width is None else width - LABEL_WIDTH)
        yield Text.assemble((f"  {label:<11}", "dim"), first)
        yield from (Text(" " * LABEL_WIDTH + line) for line in more)
    if report.is_alive and report.status and report.status.components:
        yield Text()
        yield from _component_lines(report.status.components, now_s=report.now_s, width=width)


def next_step(report: RunReport, where: str) -> str:
    """One sentence on what can be done now."""
    if report.state == FINISHED:
        return f"r2vpo resume {where} learner.steps={2 * report.step} goes on"
    if report.state in (INTERRUPTED, KILLED):
        return f"r2vpo resume {where} goes on from the newest checkpoint"
    if report.state == FAILED:
        return f"r2vpo logs {where} says why; r2vpo resume {where} goes on from the newest checkpoint"
    if report.state == SILENT:
        return f"r2vpo logs {where} may say why; if nothing comes, kill process {report.pid} and r2vpo resume {where}"
    return f"r2vpo logs {where} --follow; r2vpo stop {where} ends it with a checkpoint"


def end_sentence(report: RunReport) -> str:
    """How a run that nobody runs has ended: ``finished after 6 steps in 1:02``."""
    if report.summary is not None and report.state != KILLED:
        return f"{report.state} after {report.summary['steps']} steps in {clock_text(report.summary['wall_s'])}"
    if report.status is None and report.summary is None:
        return "killed before its first word"
    return f"killed after at least {report.step} steps"


def _place(report: RunReport) -> str:
    said = report.status
    if not report.is_alive:
        return end_sentence(report).partition(" ")[2]
    if said is None:
        return f"process {report.pid}, which has not said anything yet"
    heard = f"; it has said nothing for {_age(said.updated_s, report.now_s)}" if report.state == SILENT else ""
    return f"step {said.step} of {said.steps}, version {said.version}, process {report.pid} on {said.host}{heard}"


def _end_rows(report: RunReport) -> Iterator[tuple[str, str]]:
    """Of a run that is over, or that has not said anything yet."""
    result, said = report.summary, report.status
    if result is not None and "eval" in result:
        before, after = (result["eval"][label]["accuracy"] for label in ("before", "after"))
        if before is not None and after is not None:
            yield "accuracy", f"{before:.3f} → {after:.3f}"
    if said is not None and report.state in (KILLED, FAILED):
        yield "last seen", f"{_age(said.updated_s, report.now_s)} ago: {said.phase}"


def _run_rows(said: RunStatus, now_s: float) -> Iterator[tuple[str, str]]:
    yield "doing", f"{said.phase}, for {_age(said.phase_since_s, now_s)}"
    rates = said.rates

    def read(key: str, form: str) -> str:
        return shown(number(rates, key), form)

    if rates:
        step_s = number(rates, "time/step_s")
        left = f"; {clock_text(step_s * (said.steps - said.step))} left at this pace" if step_s is not None else ""
        yield (
            "last step",
            f"{shown(step_s, '.2f')} s, {percent(learner_idle(rates))} of it waiting; "
            f"{thousands(number(rates, 'rollout/tokens_per_s'))} tokens/s{left}",
        )
        yield (
            "trained",
            f"reward {read('train/reward_mean', '.3f')}, V {read('dual/second_moment', '.4f')}, "
            f"λ {read('dual/lambda', '.2f')}, "
            f"lag {read('train/lag_mean', '.1f')} (max {read('train/lag_max', '.0f')}), "
            f"{percent(stale_share(rates))} stale, sync {milliseconds(number(rates, 'sync/pause_s'))}",
        )
    workers = [c for c in said.components if c.role == "rollout"]
    serving = sum(c.state == "serving" for c in workers)
    yield "workers", f"{serving} serving of {said.target_workers} wanted"
    if said.store is not None:
        yield from _store_rows(said.store, now_s)


def _store_rows(store: StoreStatus, now_s: float) -> Iterator[tuple[str, str]]:
    unusable = ", ".join(f"{count:,} {reason}" for reason, count in store.unusable.items() if count)
    yield (
        "store",
        f"{store.groups:,} groups: {store.fresh_waiting:,} fresh waiting, {store.stale_eligible:,} stale eligible"
        f"{f'; never sampled: {unusable}' if unusable else ''}; {store.held_groups:,} on disk, "
        f"{size_text(store.held_bytes)}",
    )
    yield "leases", f"{store.in_flight:,} prompts are being answered"
    for wait in store.waits:
        yield "waiting", f"{wait.who} for {wait.what}, for {_age(wait.since_s, now_s)}"
    for trouble in store.troubles:
        yield "trouble", trouble


def _component_lines(components: tuple[ComponentStatus, ...], *, now_s: float, width: int | None) -> Iterator[Text]:
    def optional(value: int | None) -> str:
        return "–" if value is None else f"{value:,}"

    yield from table(
        [
            Column(
                head="component", cells=[f"{c.name} ({c.pool})" if c.pool else c.name for c in components], style=ACCENT
            ),
            Column(head="state", cells=[c.state for c in components], styles=COMPONENT_STYLES),
            Column(head="since", cells=[_age(c.since_s, now_s) for c in components], right=True),
            Column(head="weights", cells=[optional(c.version) for c in components], right=True, keep=4),
            Column(head="groups", cells=[optional(c.in_flight) for c in components], right=True, keep=3),
            Column(head="restarts", cells=[str(c.restarts) for c in components], right=True, keep=2),
            Column(head="node", cells=[c.node for c in components], keep=1),
            Column(head="doing", cells=[printable(c.doing) for c in components]),
        ],
        width,
    )
    for component in components:
        if component.last_error:
            yield Text.assemble((f"{component.name}: ", ACCENT), printable(component.last_error))


def _wrapped(text: str, width: int | None) -> list[str]:
    """The text in lines that end between words, so that a command can be copied; one line where there is no width."""
    if width is None:
        return [text]
    return textwrap.wrap(text, max(width, 20), break_long_words=False, break_on_hyphens=False) or [""]


def _age(since_s: float, now_s: float) -> str:
    """How long ago; clocks of two machines may differ a little."""
    return clock_text(max(0.0, now_s - since_s))
