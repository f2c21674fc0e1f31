"""What may change when a run goes on: every setting is in one of three classes.

| class | a changed value | because |
|---|---|---|
| fixed | is refused | the store, the order of prompts or the checkpoint depends on it: it would be another run |
| asked | is refused unless ``--allow-change KEY`` names it | the run would mean something else from here on |
| free | is taken | it decides how fast, how long, where and how safely the run works, not what it learns |

What was allowed is recorded in history.jsonl. docs/settings.md shows the class of every setting.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any

from learner.checkpoint import newest, read_state
from r2vpo.job.config import RunConfig, load_config
from r2vpo.job.history import read_starts
from r2vpo.job.rundir import RunDir
from r2vpo.job.settings import ConfigError, leaves

Changes = Mapping[str, tuple[Any, Any]]
"""Old and new value of settings, by dotted key."""

_PROMPTS = "which prompts there are, and in what order, follows from it"
_CUT = "the checkpoint is written for it"
FIXED = {
    "seed": "the order of prompts and the split into minibatches follow from it",
    "model.path": "the checkpoint holds the weights of this model",
    "task.name": _PROMPTS,
    "task.path": _PROMPTS,
    "task.eval_path": _PROMPTS,
    "task.eval_prompts": "the prompts that are held out, and thereby those that are not, follow from it",
    "task.split": _PROMPTS,
    "task.options": _PROMPTS,
    "replay.directory": "the files of the store lie there",
    "replay.shards": "the groups lie in as many files, by the hash of their prompts' keys",
    "learner.ranks": _CUT,
    "learner.zero_stage": _CUT,
    "learner.dtype": _CUT,
}
"""Settings that cannot change, each with the reason."""

ASKED = frozenset(
    f"{section}.{name}"
    for section, names in {
        "model": "trust_remote_code",
        "task": "prompt_field truth_field prompt_template chat reward",
        "algorithm": (
            "name delta dual dual_rate lambda_init lambda_min lambda_max brake step_control end_early weight_cap "
            "clip_low clip_high tau_positive tau_negative m2_limit advantage loss_mean loss_length"
        ),
        "rollout": "group_size max_tokens temperature top_p top_k min_p max_model_len dtype",
        "replay": (
            "sample max_lag max_replay_lag min_verdicts stale_fraction samples_per_insert priority priority_exponent "
            "max_uses skip_no_signal"
        ),
        "learner": (
            "groups_per_step minibatches passes lr warmup_steps weight_decay adam_beta1 adam_beta2 adam_eps grad_clip"
        ),
    }.items()
    for name in names.split()
)
"""Settings that decide what is learnt, from what and how."""

FREE = frozenset({"name", "run_dir"}) | frozenset(
    f"{section}.{name}"
    for section, names in {
        "task": "eval_sets eval_every reward_deadline_s reward_memory_mb reward_processes",
        "rollout": (
            "workers autoscale.min autoscale.max groups_in_flight kv_cache_gb gpu_memory_utilization "
            "tensor_parallel_size enforce_eager prefix_caching num_cpus num_gpus resources labels spot pools "
            "omp_threads start_timeout_s"
        ),
        "replay": "evict_after_lag capacity_groups capacity_gb lease_s",
        "learner": (
            "steps micro_batch_tokens gradient_checkpointing attention bucket_mb weight_transport sync_every "
            "checkpoint_every keep_checkpoints keep_every max_bad_steps num_cpus num_gpus resources omp_threads "
            "step_timeout_s"
        ),
        "supervisor": "max_restarts window_s backoff_s silent_s probe_every_s",
        "tracking": "wandb project",
        "ray": "address num_cpus object_store_mb",
    }.items()
    for name in names.split()
)
"""All others, by name: a new setting belongs to no class until somebody has thought about it, and a test says so."""


class OnResume(StrEnum):
    """What happens to a changed value when a run goes on."""

    FIXED = "fixed"
    ASKED = "asked"
    FREE = "free"


def on_resume(key: str) -> OnResume:
    """The class of a setting. ``KeyError`` if it belongs to none, or to several."""
    classes = {OnResume.FIXED: FIXED, OnResume.ASKED: ASKED, OnResume.FREE: FREE}
    found = [name for name, keys in classes.items() if key in keys]
    if len(found) != 1:
        raise KeyError(
            f"{key} must be in one of FIXED, ASKED and FREE of r2vpo/job/resume.py, it is in {found or 'none'}"
        )
    return found[0]


def check_resumable(run: RunDir, config: RunConfig, *, allowed: Collection[str] = ()) -> Changes:
    """Refuse to go on with ``run`` as another one, or from a checkpoint that is damaged; returns what was allowed.

    Settings are compared with those of the run's last start, whatever its config.yaml says by now. ``ConfigError``
    names every change that is refused, with both values and what to do.
    """
    try:
        if checkpoint := newest(run.checkpoints):
            read_state(checkpoint)
    except ValueError as error:
        raise ConfigError(f"--resume: {error}") from None
    starts = read_starts(run)
    return check_changes(starts[-1].config() if starts else load_config(run.config), config, allowed=allowed)


def check_changes(old: RunConfig, new: RunConfig, *, allowed: Collection[str]) -> Changes:
    """The changes from ``old`` to ``new`` that ``allowed`` names. ``ConfigError`` as in `check_resumable`."""
    before, after = dict(leaves(old)), dict(leaves(new))
    for key in allowed:
        if key not in after:
            raise ConfigError(f"--allow-change {key}: {key} is not a setting; name one as in learner.lr")
        if on_resume(key) is OnResume.FIXED:
            raise ConfigError(f"--allow-change {key}: {key} cannot change in a run, since {FIXED[key]}")
    changes = {key: (before[key], value) for key, value in after.items() if before[key] != value}
    fixed = [f"{_text(key, changes)}, but {FIXED[key]}" for key in changes if on_resume(key) is OnResume.FIXED]
    asked = [key for key in changes if on_resume(key) is OnResume.ASKED and key not in allowed]
    sentences = []
    if fixed:
        sentences.append(f"{'; '.join(fixed)}: keep the old value, or start another run with name=…")
    if asked:
        flags = " ".join(f"--allow-change {key}" for key in asked)
        sentences.append(
            f"{', '.join(_text(key, changes) for key in asked)} would change what run {old.name} means: keep the old "
            f"value{'' if len(asked) == 1 else 's'}, or add {flags}"
        )
    if sentences:
        raise ConfigError(f"--resume: {'; and '.join(sentences)}")
    return {key: both for key, both in changes.items() if on_resume(key) is OnResume.ASKED}


def changes_text(changes: Changes) -> str:
    """The changes for people: ``learner.lr=1e-05 (was 1e-06)``."""
    return ", ".join(_text(key, changes) for key in changes)


def _text(key: str, changes: Changes) -> str:
    before, after = changes[key]
    return f"{key}={_value(after)} (was {_value(before)})"


def _value(value: Any) -> str:
    """A value as YAML has it, on one line."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else " ".join(str(value).split())
