import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.job.config import ModelConfig, RunConfig
from r2vpo.job.live_view import LiveView, budget_text
from r2vpo.job.readings import clock_text, sparkline
from r2vpo.job.view import PlainView, make_view

METRICS = {
    "train/reward_mean": 0.512,
    "train/tokens": 400,
    "train/stale_tokens": 100,
    "train/lag_mean": 2.25,
    "train/lag_max": 9,
    "dual/second_moment": 0.018,
    "dual/lambda": 0.47,
    "dual/saturated": 0.0,
    "control/scale": 1.31,
    "control/budget_share": 0.6,
    "step/lr": 1.2e-4,
    "rollout/tokens_per_s": 8123.4,
    "rollout/idle_fraction": 0.31,
    "time/step_s": 2.0,
    "time/wait_s": 0.5,
    "sync/pause_s": 0.021,
}
SUMMARY = {
    "run": "toy",
    "status": "finished",
    "steps": 120,
    "wall_s": 161.2,
    "eval": {
        "before": {"accuracy": 0.398, "greedy": 0.47, "num_prompts": 512},
        "after": {"accuracy": 0.842, "greedy": 0.912, "num_prompts": 512},
    },
    "rollouts": {"trajectories": 15360},
    "replay": {"stale_fraction_trained": 0.46},
    "lag": {"mean": 2.1, "max": 14},
    "sync": {"count": 118, "pause_s_p50": 0.021, "pause_s_max": 0.048, "canary_gap_max": 6.1e-6},
}
UNKNOWN = {
    **SUMMARY,
    "status": "failed",
    "steps": 0,
    "eval": {label: {"accuracy": None, "greedy": None, "num_prompts": 0} for label in ("before", "after")},
    "replay": {"stale_fraction_trained": None},
    "lag": {"mean": None, "max": None},
    "sync": {"count": 0, "pause_s_p50": None, "pause_s_max": None, "canary_gap_max": None},
}


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    (tmp_path / "toy" / "model").mkdir(parents=True)
    (tmp_path / "toy" / "metrics.jsonl").touch()
    return tmp_path / "toy"


@pytest.fixture
def plain(config, run_path):
    out, clock = io.StringIO(), Clock()
    return PlainView(config, run_path, out=out, clock=clock), out, clock


@pytest.fixture
def rich(config, run_path):
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100, record=True)
    clock = Clock()
    return LiveView(config, run_path, console=console, clock=clock), console, clock


def play(view, clock: Clock) -> None:
    """A short run of four steps, two seconds each."""
    with view:
        view.phase("engine 1 of 1: loading")
        clock.now_s += 12.3
        view.phase("evaluation before")
        view.evaluation("before", 0.398, 0.47, 512)
        for step in range(1, 5):
            clock.now_s += 2.0
            view.step(METRICS | ({"eval/accuracy": 0.6} if step == 3 else {}), step, 120)
        view.note("λ is pinned at its ceiling 1.5")
        view.finish(SUMMARY)


def test_plain_lines_say_everything_once(plain):
    view, out, clock = plain
    play(view, clock)
    lines = out.getvalue().splitlines()
    assert "[0:12] evaluation before" in lines
    assert "accuracy before: 0.398 sampled, 0.470 greedy, on 512 held-out prompts" in lines
    [third] = [line for line in lines if line.startswith("step   3/120")]
    for part in ("reward 0.512", "accuracy 0.600", "V 0.0180/0.024", "λ 0.47", "scale 1.31", "lag 2.2 (max 9)"):
        assert part in third
    for part in ("stale 25 %", "8,123 tokens/s", "sync 21 ms"):  # 100 of 400 tokens
        assert part in third
    assert "3:54 left" in third  # 117 steps of 2 s
    assert "note: λ is pinned at its ceiling 1.5" in lines
    assert "toy: finished after 120 steps in 2:41" in lines
    assert any(line.split() == ["model/", "the", "trained", "model,", "Hugging", "Face", "format"] for line in lines)
    assert not any(line.strip().startswith("summary.json") for line in lines)  # it is not there
    assert lines[-1].endswith("toy/config.yaml --resume learner.steps=240")


def test_plain_steps_are_thinned_out_in_time_but_the_last_is_said(plain):
    view, out, clock = plain
    for step in range(1, 41):
        clock.now_s += 0.5
        view.step(METRICS, step, 40)
    steps = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
    assert steps == [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 40]


def test_the_live_picture_shows_every_reading(rich, config):
    view, console, clock = rich
    with view:
        view.evaluation("before", 0.398, 0.47, 512)
        for step in range(1, 4):
            clock.now_s += 2.0
            view.step(METRICS | {"train/reward_mean": step / 10, "eval/accuracy": 0.6}, step, 120)
        view.phase("evaluation after")
        clock.now_s += 3.0
        with console.capture() as captured:
            console.print(view.render())
    picture = captured.get()
    for part in (
        "step 3 of 120",
        "0:09 · 3:54 left",
        "0.300",
        "▁▅█",
        "0.398 → ",
        "0.600",
        "step 3",
        "0.0180",
        "of 0.024",
    ):
        assert part in picture
    for part in ("2.2 mean, 9 max", "25 % of tokens", "8,123 tokens/s", "21 ms", "learner 25 %, rollout 31 %"):
        assert part in picture
    for part in ("1.31×", "lr 1.2e-04", "0.7 … 1.5", "evaluation after  3 s"):
        assert part in picture


def test_the_live_view_leaves_a_record_and_a_closing_panel(rich):
    view, console, clock = rich
    play(view, clock)
    text = console.export_text()
    assert "✓ engine 1 of 1: loading" in text
    assert "12.3 s" in text
    assert "● accuracy before: 0.398 sampled" in text
    assert "! λ is pinned at its ceiling 1.5" in text
    assert "toy: finished after 120 steps in 2:41" in text
    assert "0.398 → 0.842 sampled at temperature 1, 0.470 → 0.912 greedy (512 held-out prompts)" in text
    assert "118 weight loads, median pause 21 ms, longest 48 ms; canary gap 6e-06 at most" in text


@pytest.mark.parametrize("width", [30, 60, 83, 84, 200])
@pytest.mark.parametrize("metrics", [{}, METRICS, dict.fromkeys(METRICS, math.nan), dict.fromkeys(METRICS)])
@pytest.mark.parametrize("name", ["r2vpo", "grpo"])
def test_any_width_and_any_metrics_can_be_drawn(run_path, width, metrics, name):
    config = RunConfig(name="toy", model=ModelConfig(path="m"), algorithm=AlgorithmConfig(name=name))
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    with LiveView(config, run_path, console=console) as view:
        view.step(metrics, 1, 3)
        console.print(view.render())
        view.finish(UNKNOWN)
    plain = PlainView(config, run_path, out=io.StringIO())
    with plain as view:
        view.step(metrics, 1, 3)
        view.finish(UNKNOWN)


def test_an_interrupted_run_is_told_how_to_go_on_as_it_was(plain):
    view, out, _ = plain
    view.finish({**SUMMARY, "status": "interrupted", "steps": 37})
    assert "toy: interrupted after 37 steps" in out.getvalue()
    assert out.getvalue().rstrip().endswith("config.yaml --resume")


def test_an_error_marks_the_phase_it_broke(rich):
    view, console, _ = rich
    view.__enter__()
    view.phase("engine 1 of 1: loading")
    view.__exit__(RuntimeError, RuntimeError("it failed"), None)
    assert "✗ engine 1 of 1: loading" in console.export_text()


def test_the_view_fits_the_output(config, run_path):
    assert isinstance(make_view(config, run_path, console=Console(force_terminal=True)), LiveView)
    assert isinstance(make_view(config, run_path, console=Console(file=io.StringIO())), PlainView)


def test_a_sparkline_rises_where_its_values_do():
    assert sparkline([], 5) == ""
    assert sparkline([3.0], 5) == "▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 1, 1], 2) == "▁█"  # means 0 and 1
    assert len(sparkline(list(range(1000)), 28)) == 28


def test_the_gauge_fills_half_at_the_budget():
    gauge = budget_text(0.02, 0.02).plain
    assert gauge.count("━") == 10
    assert gauge.index("│") == gauge.rindex("━") + 1
    assert budget_text(1.0, 0.02).plain.count("━") == 20
    assert "━" not in budget_text(0.02, None).plain
    assert "━" not in budget_text(0.02, 0.0).plain  # a batch without any signal


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.6, "1:02"), (3599.6, "1:00:00"), (3723, "1:02:03")])
def test_times_read_as_on_a_clock(seconds, text):
    assert clock_text(seconds) == text
