"""What importing a module really brings along, seen in `sys.modules` of a fresh process.

import-linter reads import statements; it does not see what an import executes, such as an eager import in an
`__init__` of ours or of a library. Each row below is one process that imports its modules one after the other and stops
at the first that brings something forbidden. New modules join their room's row by themselves.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("r2vpo", "rollout", "replay", "learner")

ENGINES = frozenset({"deepspeed", "ray", "vllm"})
HEAVY = ENGINES | {"datasets", "pandas", "pyarrow", "sympy", "torch", "transformers", "wandb"}

ROOF = frozenset({"r2vpo.cli", "r2vpo.job"})

PROBE = """
import importlib, sys
forbidden = set(sys.argv[1].split(","))
for module in sys.argv[2:]:
    importlib.import_module(module)
    found = {".".join(name.split(".")[:depth]) for name in sys.modules for depth in (1, 2)} & forbidden
    if found:
        sys.exit(f"import {module} brings {', '.join(sorted(found))}")
"""


def modules_of(*packages: str) -> set[str]:
    """Dotted names of all modules beneath the packages."""
    paths = (
        path.relative_to(ROOT) for package in packages for path in ROOT.glob(f"{package.replace('.', '/')}/**/*.py")
    )
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths}


@dataclass(frozen=True)
class Row:
    modules: set[str]
    forbidden: Set[str]


ROWS = {
    "the words bring no framework": Row(
        {"r2vpo", "r2vpo.records", "r2vpo.checks", "r2vpo.checksum", "r2vpo.logfile"},
        HEAVY | {"omegaconf", "rich", "safetensors", "rollout", "replay", "learner", "r2vpo.algorithm"},
    ),
    "settings are light": Row(
        {name for name in modules_of(*PACKAGES) if name.endswith(".config")} - {"r2vpo.job.config"},
        HEAVY | {"omegaconf", "rich"},
    ),
    "the command line starts light": Row({"r2vpo.cli", "r2vpo.job.config"}, HEAVY),
    "the mathematics brings no engine": Row(
        modules_of("r2vpo.algorithm"),
        ENGINES | {"datasets", "wandb", "rollout", "replay", "learner"} | ROOF,
    ),
    "replay brings no tensor library": Row(
        modules_of("replay") - {"replay.actor"},
        HEAVY | {"rollout", "learner", "r2vpo.algorithm"} | ROOF,
    ),
    "replay's actor brings only ray": Row(
        {"replay.actor"},
        {"deepspeed", "torch", "transformers", "vllm", "rollout", "learner"} | ROOF,
    ),
    "tasks are light": Row(modules_of("rollout.tasks") - {"rollout.tasks.math"}, HEAVY),
    "a reward process starts light": Row({"rollout.reward_process"}, HEAVY | {"numpy"}),
    "rollout outside its engine brings no engine": Row(
        modules_of("rollout") - {"rollout.actor", "rollout.engine", "rollout.nccl_transfer", "rollout.weight_transfer"},
        ENGINES | {"wandb", "replay", "learner"} | ROOF,
    ),
    "the learner brings no other engine": Row(
        modules_of("learner") - {"learner.actor"},
        {"ray", "vllm", "wandb", "rollout", "replay"} | ROOF,
    ),
    "the learner's tensors and boards need no DeepSpeed": Row(
        modules_of("learner") - {"learner.actor", "learner.engine", "learner.export", "learner.trainer"},
        {"deepspeed", "transformers"},
    ),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_importing_brings_nothing_forbidden(row: Row) -> None:
    command = [sys.executable, "-c", PROBE, ",".join(row.forbidden), *sorted(row.modules)]
    probe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert probe.returncode == 0, probe.stderr


def test_every_part_of_r2vpo_has_a_floor_in_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = next(contract["layers"] for contract in contracts if contract["id"] == "rooms")
    placed = {part.strip() for floor in floors for part in floor.replace("|", ":").split(":")}
    parts = {".".join(name.split(".")[:2]) for name in modules_of("r2vpo")} - {"r2vpo"}
    assert parts - placed == set()
