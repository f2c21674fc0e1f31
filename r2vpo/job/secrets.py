"""Secrets are no settings: what is written into a config file goes into config.yaml, history.jsonl, W&B and reports.

A value counts as a secret if it has the form of a well-known kind of key, or is the value of an environment variable
that is named like one. Nothing here, nor any message, repeats the value.
"""

from __future__ import annotations

import os
import re

FORMS = re.compile(
    r"hf_[A-Za-z0-9]{30,}|wandb_v1_[A-Za-z0-9_]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}"
    r"|github_pat_[A-Za-z0-9_]{30,}|xox[abprs]-[A-Za-z0-9-]{20,}|AKIA[0-9A-Z]{16}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s:@]+@"
)
"""Keys of Hugging Face, W&B, OpenAI, GitHub, Slack and AWS; signed tokens, private keys, passwords in addresses."""
WANDB_KEY = re.compile(r"[0-9a-f]{40}")
"""An older key of W&B looks like a commit of git, so it counts only where W&B is meant."""
NAMES = re.compile(r"(^|_)(api_?key|key|token|secret|password|passwd|credentials?)(_|$)", re.IGNORECASE)
"""Names of settings and of environment variables that hold secrets."""
MIN_CHARACTERS = 12
"""Shorter values of such variables are flags and numbers rather than secrets."""

WHERE = {"wandb": "WANDB_API_KEY, or log in once with `wandb login`", "hf": "HF_TOKEN", "ray": "RAY_AUTH_TOKEN"}


def problem(key: str, value: str) -> str | None:
    """A sentence that names ``key`` if ``value`` is a secret; None if it is none."""
    found = FORMS.search(value) or (key.startswith("tracking.") and WANDB_KEY.fullmatch(value.strip()))
    variable = next((name for name, text in _in_environment() if text in value), None)
    if not found and variable is None:
        return None
    what = f"the value of the environment variable {variable}" if variable else "what looks like a secret"
    return f"{key} holds {what}, and settings are copied into files and to W&B; {advice(key)}"


def is_named_like_one(key: str) -> bool:
    """Whether a setting of this name would hold a secret, such as ``tracking.wandb_api_key``."""
    return NAMES.search(key.rpartition(".")[2]) is not None


def advice(key: str) -> str:
    """Where a secret belongs."""
    kind = next((kind for kind in WHERE if kind in key.lower()), "wandb" if key.startswith("tracking.") else None)
    return f"secrets belong into the environment{f': set {WHERE[kind]}' if kind else ''}"


def _in_environment() -> list[tuple[str, str]]:
    """Name and value of every variable that holds a secret."""
    return [
        (name, value)
        for name, value in os.environ.items()
        if NAMES.search(name) and len(value) >= MIN_CHARACTERS and not os.path.exists(value)
    ]
