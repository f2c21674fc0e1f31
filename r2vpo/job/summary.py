"""summary.json: what a run came to, computed from its step metrics and a few final facts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from r2vpo.job.config import RunConfig
from r2vpo.records import Evaluation, SyncRecord

RUNNING = "running"
"""Written once the run has begun; a run that says so although nobody runs it was killed."""
FINISHED = "finished"
INTERRUPTED = "interrupted"
FAILED = "failed"

Metrics = Mapping[str, Any]


def summarise(
    config: RunConfig,
    *,
    steps: Sequence[Metrics],
    status: str,
    wall_s: float,
    evaluations: Mapping[str, Evaluation],
    store: Mapping[str, Any],
    syncs: Sequence[SyncRecord],
    restarts: Mapping[str, int],
) -> dict[str, Any]:
    """The content of summary.json: nested objects, so that ``eval.before.accuracy`` is a path. Unknown is null.

    Args:
        config: the run's settings.
        steps: the metrics of every learner step of the run, also those before a resume.
        status: ``running``, ``finished``, ``interrupted`` or ``failed``.
        wall_s: seconds from the command to its end.
        evaluations: by label; ``before`` and ``after`` are reported.
        store: the store's counts: ``version``, ``groups``, ``trajectories``, ``sampled_tokens``, and
            ``outcomes`` by type; where known also ``uses`` by kind, ``no_signal``, ``held_bytes``, ``shards`` and the
            ``unusable`` groups by reason.
        syncs: every weight load of every worker. Version 0, the initial weights, counts only for the canary.
        restarts: parts that were started again, by role, since the command was given.
    """
    trained_tokens = sum(_column(steps, "train/tokens"))
    train_s = sum(_column(steps, "time/step_s"))
    pauses_s = [sync.pause_s for sync in syncs if sync.version > 0]
    return {
        "run": config.name,
        "status": status,
        "steps": len(steps),
        "version": store["version"],
        "wall_s": wall_s,
        "algorithm": config.algorithm.name,
        "eval": {label: _evaluation(evaluations.get(label)) for label in ("before", "after")},
        "rollouts": {
            "groups": store["groups"],
            "trajectories": store["trajectories"],
            "tokens": store["sampled_tokens"],
        },
        "replay": {
            "stale_fraction_trained": _share(sum(_column(steps, "train/stale_tokens")), trained_tokens),
            **_replay(store),
        },
        "lag": {
            "mean": _weighted(steps, "train/lag_mean", "train/tokens"),
            "max": max(_column(steps, "train/lag_max"), default=None),
        },
        "sync": {
            "count": len(pauses_s),
            "pause_s_p50": median(pauses_s) if pauses_s else None,
            "pause_s_max": max(pauses_s, default=None),
            "canary_gap_max": _finite(max((sync.canary_gap for sync in syncs), default=None)),
        },
        "dual": {
            "lambda": next(reversed(_column(steps, "dual/lambda")), None),
            "second_moment": _mean(_column(steps, "dual/second_moment")),
            "second_moment_max": max(_column(steps, "dual/second_moment_max"), default=None),
        },
        "outcomes": dict(store["outcomes"]),
        "restarts": {role: restarts.get(role, 0) for role in ("rollout", "learner", "shard", "job")},
        "throughput": {
            "trajectories_per_s": _share(store["trajectories"], train_s),
            "tokens_per_s": _share(store["sampled_tokens"], train_s),
        },
        "learner": {"idle_fraction": _share(sum(_column(steps, "time/wait_s")), train_s)},
        "rollout": {"idle_fraction": _weighted(steps, "rollout/idle_fraction", "time/step_s")},
    }


def earlier_evaluations(path: Path) -> dict[str, Evaluation]:
    """The evaluation of version 0 from the summary at ``path`` of a run's earlier part, if it left one."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))["eval"]["before"]
    return {} if before["accuracy"] is None else {"before": _read_evaluation(before)}


def evaluation_metrics(result: Evaluation) -> dict[str, float]:
    """An evaluation during the training, as metrics of the step that it follows."""
    metrics = {"eval/accuracy": result.accuracy, "eval/greedy_accuracy": result.greedy_accuracy}
    for name, score in result.sets.items():
        metrics |= {f"eval/{name}/accuracy": score.accuracy, f"eval/{name}/greedy_accuracy": score.greedy_accuracy}
    return metrics


def _read_evaluation(written: Mapping[str, Any]) -> Evaluation:
    """What `_evaluation` wrote of the initial weights; an accuracy that was none is NaN again."""
    return Evaluation(
        version=0,
        accuracy=_number(written["accuracy"]),
        greedy_accuracy=_number(written["greedy"]),
        num_prompts=written["num_prompts"],
        sets={name: _read_evaluation(score) for name, score in written.get("sets", {}).items()},
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _evaluation(result: Evaluation | None) -> dict[str, Any]:
    if result is None:
        return {"accuracy": None, "greedy": None, "num_prompts": 0}
    sets = {name: _evaluation(score) for name, score in result.sets.items()}
    return {
        "accuracy": _finite(result.accuracy),
        "greedy": _finite(result.greedy_accuracy),
        "num_prompts": result.num_prompts,
    } | ({"sets": sets} if sets else {})


def _replay(store: Metrics) -> dict[str, Any]:
    """What the store says of itself; null where it was never asked."""
    unusable, shards = store.get("unusable"), store.get("shards")
    return {
        "shards": None if shards is None else len(shards),
        "uses": store.get("uses"),
        "no_signal": store.get("no_signal"),
        "damaged": None if unusable is None else unusable["damaged"],
        "held_bytes": store.get("held_bytes"),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _column(steps: Sequence[Metrics], key: str) -> list[float]:
    """The finite values of a metric, in the order of the steps."""
    values = [_finite(step.get(key)) for step in steps]
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _weighted(steps: Sequence[Metrics], key: str, weight: str) -> float | None:
    """Mean of a metric over the steps that have it, weighted by another."""
    known = [step for step in steps if _finite(step.get(key)) is not None and _finite(step.get(weight)) is not None]
    return _share(sum(step[key] * step[weight] for step in known), sum(step[weight] for step in known))
