"""What the files in docker/ say, read as their tools read them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, with its continuation lines."""

    verb: str
    words: list[str]


def instructions(dockerfile: Path) -> list[Instruction]:
    """``RUN bash x y`` becomes ``Instruction("RUN", ["bash", "x", "y"])``; comments are left out."""
    text = re.sub(r"^\s*#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines() if line.strip()]
    return [Instruction(verb, words) for verb, *words in lines]


def manifest(name: str) -> dict[str, Any]:
    """A YAML file of docker/, one document."""
    return yaml.safe_load((DOCKER / name).read_text())


def pins(path: Path) -> list[str]:
    """The lines of a list that are neither empty nor a comment."""
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def option(words: list[str], name: str) -> str:
    """The value of ``--name=value``."""
    return next(word.removeprefix(f"--{name}=") for word in words if word.startswith(f"--{name}="))
