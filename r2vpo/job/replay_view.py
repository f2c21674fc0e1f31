"""What ``r2vpo replay`` shows to people: lines of text, coloured and fitted to the width on a terminal.

In a pipe or a file the same lines come without colours, and no column gives way to a limit of width.
"""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from r2vpo.job.readings import percent, shown, sparkline, thousands
from r2vpo.records import Trajectory
from replay.export import Exported
from replay.reader import StoredGroup, StoreStats, VersionReward
from replay.shard_view import GroupInfo

ACCENT = "cyan"
BAR_WIDTH = 24
MOST_ROWS = 16
"""Most rows of a histogram or of the table of rewards; neighbours share one where there are more."""
STATE_STYLES = {"waiting": "green", "chosen": "cyan", "late": "yellow", "damaged": "red", "ahead": "yellow"}


class Screen:
    """Standard output. ``width`` is None where it is no terminal: then nothing is left out or coloured."""

    def __init__(self) -> None:
        console = Console()
        self._console = console if console.is_terminal and not console.is_dumb_terminal else None
        self.width = None if self._console is None else self._console.width

    def say(self, lines: Iterator[Text]) -> None:
        """Print the lines as they come."""
        for line in lines:
            if self._console is not None:
                self._console.print(line, soft_wrap=True)
            else:
                print(line.plain.rstrip())


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table."""

    head: str
    cells: Sequence[str]
    right: bool = False
    """Numbers stand on the right."""
    style: str = ""
    styles: Mapping[str, str] | None = None
    """By the cell's first word."""
    keep: int = 0
    """Columns of a lower number give way first where the terminal is narrow; 0 never does."""

    @property
    def width(self) -> int:
        """Characters of the widest cell."""
        return max(len(cell) for cell in (self.head, *self.cells))


def table(columns: Sequence[Column], width: int | None) -> Iterator[Text]:
    """A head and one line per row; columns that do not fit into ``width`` are left out."""
    shown_columns = list(columns)
    while width is not None and sum(c.width + 2 for c in shown_columns) - 2 > width:
        optional = [c for c in shown_columns if c.keep]
        if not optional:
            break
        shown_columns.remove(min(optional, key=lambda c: c.keep))
    yield _row([(c, c.head, "dim") for c in shown_columns])
    for cells in zip(*(c.cells for c in shown_columns), strict=True):
        yield _row([(c, cell, _style(c, cell)) for c, cell in zip(shown_columns, cells, strict=True)])


def stats_lines(name: str, stats: StoreStats) -> Iterator[Text]:
    """``r2vpo replay stats``."""
    yield Text.assemble((name, f"bold {ACCENT}"), f"  next step {stats.version}")
    for label, text in _stat_rows(stats):
        yield Text.assemble((f"  {label:<11}", "dim"), text)
    for title, rows in (
        ("lag when trained (steps), fresh", _bars(stats.lags["fresh"])),
        ("lag when trained (steps), stale", _bars(stats.lags["stale"])),
        ("uses per group", _bars(stats.uses)),
    ):
        if rows:
            yield Text()
            yield Text(title, style="bold")
            yield from rows
    if stats.rewards:
        yield Text()
        yield Text.assemble(("reward by version", "bold"), "  ", (_trend(stats.rewards), ACCENT))
        yield from _reward_table(stats.rewards)


def listing_lines(infos: Sequence[GroupInfo], *, total: int, width: int | None) -> Iterator[Text]:
    """``r2vpo replay ls``: a table, and how many groups it leaves out."""
    if not infos:
        yield Text("no group" if not total else f"{total:,} groups")
        return
    columns = [
        Column(head="id", cells=[str(i.id) for i in infos], right=True, style=ACCENT),
        Column(head="key", cells=[i.key for i in infos], right=True),
        Column(head="versions", cells=[_range(i.oldest_version, i.newest_version) for i in infos], right=True),
        Column(head="uses", cells=[str(len(i.trained)) for i in infos], right=True, keep=4),
        Column(head="reward", cells=[shown(i.reward_mean, ".3f") for i in infos], right=True),
        Column(head="outcomes", cells=[_outcomes(i.outcomes) for i in infos], keep=3),
        Column(head="tokens", cells=[thousands(i.num_sampled_tokens) for i in infos], right=True, keep=2),
        Column(head="size", cells=[size_text(i.num_bytes) for i in infos], right=True, keep=1),
        Column(head="state", cells=[state_text(i) for i in infos], styles=STATE_STYLES),
    ]
    yield from table(columns, width)
    if total > len(infos):
        yield Text(f"{total - len(infos):,} more; --limit {total} shows all", style="dim")


def group_lines(stored: StoredGroup, *, tokens: bool, width: int | None) -> Iterator[Text]:
    """``r2vpo replay show``."""
    info = stored.info
    yield Text.assemble(
        (f"group {info.id}", f"bold {ACCENT}"), f"  prompt {info.key}  {state_text(info, all_steps=True)}"
    )
    rows = [
        ("versions", f"{_range(info.oldest_version, info.newest_version)}, leased at {info.lease_version}"),
        ("trained", ", ".join(f"step {step} ({kind})" for step, kind in info.trained) or "never"),
        ("reward", f"{shown(info.reward_mean, '.3f')} mean" + ("" if info.has_signal else ", no signal")),
        ("tokens", f"{info.num_tokens:,}, {info.num_sampled_tokens:,} of them sampled; {size_text(info.num_bytes)}"),
        ("made by", f"{info.worker or '–'}, {_moment(info.appended_s)}"),
    ]
    if info.evicted_s is not None:
        rows.append(("evicted", _moment(info.evicted_s)))
    if stored.group is not None:
        rows.append(("truth", str(stored.group.truth)))
    for label, text in rows:
        yield Text.assemble((f"  {label:<10}", "dim"), printable(text))
    if stored.group is None:
        yield Text(stored.problem, style="yellow" if info.evicted_s is not None else "red")
        return
    yield Text("  prompt", style="dim")
    yield from _indented(stored.group.prompt)
    for member, trajectory in enumerate(stored.group.trajectories):
        yield Text()
        yield from _trajectory_lines(member, trajectory)
        if tokens:
            yield from _token_table(trajectory, width)


def export_text(done: Exported, path: Path) -> str:
    """What an export came to, in one line."""
    text = f"{path}: {done.trajectories:,} trajectories of {done.groups:,} groups, {size_text(path.stat().st_size)}"
    if done.evicted:
        text += f"; left out {done.evicted:,} group" + (
            " whose payload is evicted" if done.evicted == 1 else "s whose payloads are evicted"
        )
    return text


def state_text(info: GroupInfo, *, all_steps: bool = False) -> str:
    """``consumed at 5, 8``; of many steps the last ones unless ``all_steps``."""
    if info.state != "consumed":
        return info.state
    steps = [str(step) for step, _ in info.trained]
    few = steps if all_steps or len(steps) <= 3 else ["…", *steps[-2:]]
    return f"consumed at {', '.join(few)}"


def size_text(num_bytes: int) -> str:
    """``107 kB``."""
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.95 else f"{value:.1f} {unit}"


def printable(text: str) -> str:
    """The text without what would steer a terminal: control characters other than newline and tab are spelled out."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs") else f"\\u{ord(c):04x}" for c in text
    )


def _stat_rows(stats: StoreStats) -> list[tuple[str, str]]:
    evicted = f"; evicted {stats.evicted_groups:,} groups, {size_text(stats.evicted_bytes)}"
    rows = [
        ("groups", f"{stats.groups:,} of {stats.trajectories:,} trajectories, {stats.sampled_tokens:,} sampled tokens"),
        ("versions", "–" if stats.oldest_version is None else f"{stats.oldest_version} to {stats.newest_version}"),
        (
            "held",
            f"{stats.held_groups:,} groups, {size_text(stats.held_bytes)}" + (evicted if stats.evicted_groups else ""),
        ),
        ("files", f"{size_text(stats.file_bytes)} in {stats.shards - len(stats.missing)} of {stats.shards} shards"),
        ("trained on", ", ".join(f"{count:,} {kind}" for kind, count in stats.trained.items())),
        ("state", _counted(stats.states)),
        ("outcomes", _counted(stats.outcomes)),
        ("unusable", _counted(stats.unusable)),
        (
            "no signal",
            f"{stats.no_signal:,} groups ({percent(stats.no_signal / stats.groups)})" if stats.groups else "–",
        ),
    ]
    return rows


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items() if count) or "none"


def _bars(histogram: Mapping[int, int]) -> list[Text]:
    """A line per value, or per range of values, with a bar and the share."""
    total = sum(histogram.values())
    if not total:
        return []
    low, high = min(histogram), max(histogram)
    wide = -(-(high - low + 1) // MOST_ROWS)
    rows = [
        (_range(first, min(first + wide - 1, high)), sum(histogram.get(first + i, 0) for i in range(wide)))
        for first in range(low, high + 1, wide)
    ]
    most = max(count for _, count in rows)
    label, number = max(4, *(len(name) for name, _ in rows)), len(f"{most:,}")
    return [
        Text.assemble(
            f"  {name:>{label}}  {count:>{number},}  {percent(count / total):>5}  ",
            ("█" * max(round(BAR_WIDTH * count / most), 1 if count else 0), ACCENT),
        )
        for name, count in rows
    ]


def _trend(rewards: Sequence[VersionReward]) -> str:
    return sparkline([r.reward for r in rewards if r.reward is not None], 2 * BAR_WIDTH)


def _reward_table(rewards: Sequence[VersionReward]) -> Iterator[Text]:
    """Rewards of at most ``MOST_ROWS`` ranges of versions."""
    count = min(MOST_ROWS, len(rewards))
    edges = [len(rewards) * index // count for index in range(count + 1)]
    ranges = [rewards[a:b] for a, b in pairwise(edges)]
    means = [_mean(of) for of in ranges]
    top = max((mean for mean in means if mean is not None), default=0.0)
    yield from table(
        [
            Column(head="version", cells=[_range(of[0].version, of[-1].version) for of in ranges], right=True),
            Column(head="groups", cells=[f"{sum(r.groups for r in of):,}" for of in ranges], right=True),
            Column(head="reward", cells=[shown(mean, ".3f") for mean in means], right=True),
            Column(
                head="",
                cells=["█" * round(BAR_WIDTH * mean / top) if mean is not None and top > 0 else "" for mean in means],
                style=ACCENT,
            ),
        ],
        None,
    )


def _mean(rewards: Sequence[VersionReward]) -> float | None:
    verdicts = sum(r.verdicts for r in rewards)
    return sum((r.reward or 0.0) * r.verdicts for r in rewards) / verdicts if verdicts else None


def _trajectory_lines(member: int, trajectory: Trajectory) -> Iterator[Text]:
    mask_T = trajectory.loss_mask_T
    mean = float(trajectory.behavior_logprob_T[mask_T].mean()) if mask_T.any() else None
    yield Text.assemble(
        (f"trajectory {member}", "bold"),
        f"  {trajectory.outcome.value}  reward {shown(trajectory.reward, '.3f')}  "
        f"{trajectory.num_trained_tokens:,} sampled tokens, mean log-prob {shown(mean, '.3f')}, "
        f"{_spans(trajectory.version_T[mask_T])}",
    )
    yield from _indented(trajectory.response)


def _spans(version_N: np.ndarray) -> str:
    """``version 3 × 12, 4 × 4``: runs of sampled tokens of one version."""
    if not len(version_N):
        return "nothing sampled"
    starts = [0, *(np.flatnonzero(np.diff(version_N)) + 1).tolist(), len(version_N)]
    return "version " + ", ".join(f"{version_N[a]} × {b - a:,}" for a, b in pairwise(starts))


def _token_table(trajectory: Trajectory, width: int | None) -> Iterator[Text]:
    mask_T = trajectory.loss_mask_T.tolist()
    numbers = list(zip(mask_T, trajectory.behavior_logprob_T.tolist(), trajectory.version_T.tolist(), strict=True))
    yield from table(
        [
            Column(head="position", cells=[str(t) for t in range(len(mask_T))], right=True),
            Column(head="token", cells=[str(i) for i in trajectory.token_ids_T.tolist()], right=True, style=ACCENT),
            Column(head="log-prob", cells=[f"{p:.4f}" if on else "–" for on, p, _ in numbers], right=True),
            Column(head="version", cells=[str(v) if on else "–" for on, _, v in numbers], right=True),
            Column(head="trained", cells=["yes" if on else "–" for on in mask_T], keep=1),
        ],
        width,
    )


def _indented(text: str) -> Iterator[Text]:
    for line in printable(text).splitlines() or [""]:
        yield Text(f"    {line}")


def _row(cells: Sequence[tuple[Column, str, str]]) -> Text:
    row = Text()
    for index, (column, cell, style) in enumerate(cells):
        padded = cell.rjust(column.width) if column.right else cell.ljust(column.width)
        row.append("  " if index else "")
        row.append(padded, style=style)
    row.rstrip()
    return row


def _style(column: Column, cell: str) -> str:
    if column.styles is not None:
        return column.styles.get(cell.split(" ")[0], "dim")
    return column.style


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


def _outcomes(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in outcomes.items() if count)


def _moment(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
