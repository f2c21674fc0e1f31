"""The plots of the documentation, as SVG files that read on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")
import matplotlib.pyplot as plt

from benchmarks.evidence import system
from benchmarks.evidence.methods import GRPO, MAIN, OURS, R2VPO
from benchmarks.evidence.statistics import WINDOW, smoothed
from benchmarks.evidence.studies import (
    RANGE,
    TASKS,
    TUNED_ON,
    lag_base,
    lag_methods,
    on_policy,
    with_replay,
)
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.gradient_weight import gradient_weight
from r2vpo.algorithm.objectives import objective

if TYPE_CHECKING:
    from benchmarks.evidence.report import Results

COLORS = {OURS: "#0b6e4f", "GRPO": "#c1440e", "clip-higher (DAPO)": "#d99a1c", "decoupled clip": "#5b6c9e"}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    OURS: {},
    "GRPO": GRPO,
    "CISPO": {"name": "cispo", "clip_low": 1.0, "clip_high": 0.28},
    "SPO": {"name": "spo"},
    "SAPO": {"name": "sapo"},
    "truncated IS": {"name": "truncated_is"},
    "plain IS": {"name": "plain_is"},
}


def draw_all(found: Results, folder: Path) -> None:
    """Draw every plot whose runs are there."""
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "r2vpo"})
    _gradient_weights(folder / "gradient-weight.svg")
    _learning_curves(found, folder / "learning-curves.svg")
    _rates(found, folder / "rates.svg")
    _lags(found, folder / "lags.svg")
    _actuators(found, folder / "actuators.svg")
    _system(folder / "system.svg")


def _gradient_weights(path: Path) -> None:
    ratio = np.linspace(0.2, 2.2, 201)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for axis, advantage in zip(axes, (1.0, -1.0), strict=True):
        for name, settings in SHAPES.items():
            loss = objective(AlgorithmConfig(**settings))
            weight = gradient_weight(loss, ratio.tolist(), advantage)
            axis.plot(ratio, weight, label=name, color=COLORS.get(name), lw=2.2 if name == OURS else 1.2)
        axis.axhline(0, color="#888888", lw=0.6)
        axis.set(title=f"advantage {advantage:+.0f}", xlabel="ratio ρ (= u here)", ylim=(-2.2, 2.2))
    axes[0].set_ylabel("gradient weight of a token")
    axes[1].legend(frameon=False, fontsize=8)
    _save(figure, path)


def _learning_curves(found: Results, path: Path) -> None:
    figure, axes = plt.subplots(1, len(TASKS), figsize=(10.5, 3.4))
    for axis, task in zip(axes, TASKS, strict=True):
        for name in MAIN:
            for base, style in ((on_policy(found.scale, task), ":"), (with_replay(found.scale, task), "-")):
                curves = [smoothed(run["curve"]["train_reward"]) for run in found.main(base, name)]
                if curves:
                    _band(axis, curves, name, style, label=f"{name}{'' if style == '-' else ', on-policy'}")
        axis.set(title=task, xlabel="thousand rollouts", ylabel="sampled accuracy")
    axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1.0))
    _save(figure, path)


def _band(axis: Any, curves: Sequence[np.ndarray], name: str, style: str, *, label: str) -> None:
    values = np.stack(curves)
    x = (np.arange(values.shape[1]) + 6) * 0.256
    axis.plot(x, values.mean(0), style, color=COLORS[name], label=label)
    if style == "-":
        axis.fill_between(x, values.min(0), values.max(0), color=COLORS[name], alpha=0.12, lw=0)


def _rates(found: Results, path: Path) -> None:
    seeds, replay = found.scale.seeds, with_replay(found.scale, TUNED_ON)
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    for name, method in ((OURS, R2VPO), ("GRPO", GRPO)):
        _points(axis, RANGE, [found.of(replay, method, seeds, lr=lr) for lr in RANGE], name)
    axis.set(xscale="log", xlabel="nominal learning rate", ylabel="accuracy", title="replay × 8, untuned", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _lags(found: Results, path: Path) -> None:
    seeds, lags = found.scale.side_seeds, found.scale.lags
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    for name, method in lag_methods().items():
        runs = [found.of(lag_base(found.scale, lag), method, seeds) for lag in lags]
        _points(axis, [lag + 1 for lag in lags], runs, name)
    axis.set(xscale="log", xlabel="lag + 1 (versions)", title="all samples that old, no replay", ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


def _system(path: Path) -> None:
    """The whole system: accuracy over rollouts, and where the ratios are by lag."""
    runs = system.kept()
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for method in system.METHODS:
        found, color = system.reported_runs(method, runs), COLORS[method.removesuffix(", on-policy")]
        if not found:
            continue
        curves = np.stack([smoothed(run["reward"]) for run in found])
        x = (np.arange(curves.shape[1]) + WINDOW) * system.FRESH * system.MEMBERS / 1000
        axes[0].plot(x, curves.mean(0), ":" if "on-policy" in method else "-", color=color, label=method)
        axes[0].fill_between(x, curves.min(0), curves.max(0), color=color, alpha=0.12, lw=0)
        if "on-policy" in method:
            continue
        buckets = system.buckets(found)
        for axis, key, style in ((axes[1], "second_moment", "o-"), (axes[1], "ratio_second_moment", "s--"),
                                 (axes[2], "ess", "o-"), (axes[2], "weight_mean", "s--")):  # fmt: skip
            means = [np.mean([run["lag"][b][key] for run in found if b in run["lag"]]) for b in buckets]
            label = {"second_moment": "(u − 1)²", "ratio_second_moment": "(ρ − 1)²", "ess": "ess"}.get(key, "w")
            axis.plot(buckets, means, style, color=color, ms=4, label=f"{method}: {label}")
    axes[0].set(xlabel="thousand rollouts", ylabel="sampled accuracy", title="whole system")
    axes[1].set(xlabel="lag (learner steps)", yscale="log", title="mean square of the ratio − 1")
    axes[2].set(xlabel="lag (learner steps)", title="effective sample size, weight")
    for axis in axes:
        axis.legend(frameon=False, fontsize=7)
    _save(figure, path)


def _points(
    axis: Any,
    x: Sequence[float],
    runs: Sequence[Sequence[Mapping[str, Any]]],
    name: str,
    *,
    figure: Callable[[Mapping[str, Any]], float] = lambda run: run["final"]["accuracy"],
) -> None:
    there = [(at, [figure(run) for run in group]) for at, group in zip(x, runs, strict=True) if group]
    if not there:
        return
    axis.plot([at for at, _ in there], [np.mean(v) for _, v in there], "o-", color=COLORS[name], label=name, ms=4)
    for at, values in there:
        axis.plot([at] * len(values), values, ".", color=COLORS[name], ms=3, alpha=0.5)


def _actuators(found: Results, path: Path) -> None:
    """V, s and λ of the runs with replay, over their learner steps."""
    runs = found.main(with_replay(found.scale, TUNED_ON), OURS)
    if not runs:
        return
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6))
    config = AlgorithmConfig()
    for run in runs:
        curve = run["curve"]
        for axis, key in zip(axes, ("second_moment", "step_scale", "lam"), strict=True):
            axis.plot(curve[key], color=COLORS[OURS], lw=1, alpha=0.7)
    for axis, bound in zip(axes[[0, 2, 2]], (config.delta, config.lambda_min, config.lambda_max), strict=True):
        axis.axhline(bound, color="#888888", lw=0.8, ls="--")
    axes[0].set(yscale="log", title="V (dashed: δ)", xlabel="learner step")
    axes[1].set(yscale="log", title="step scale s", xlabel="learner step")
    axes[2].set(title="λ (dashed: bounds)", xlabel="learner step", ylim=(0, None))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write a plot, unless the runs that it shows have not been made."""
    if not any(axis.has_data() for axis in figure.axes):
        plt.close(figure)
        return
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)
