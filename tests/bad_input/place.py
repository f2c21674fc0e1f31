"""A folder with everything that a run needs, all of it sound, for the tables of this folder to spoil."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Arrange = Callable[["Place"], Sequence[str]]
"""Spoils something, and says what stands behind ``r2vpo train CONFIG``, or the whole command line (``Command``)."""

ROW = '{"prompt": "1+1=", "answer": "2"}\n'
WORDS = {
    "model": {"type": "WordLevel", "vocab": {"1": 0, "<u>": 1}, "unk_token": "<u>"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
}
"""A tokenizer of one token per character."""


class Command(tuple[str, ...]):
    """A whole command line."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    id: str
    given: Arrange
    says: str
    """Part of the sentence."""


@dataclass(frozen=True)
class Place:
    """The folder: recipe, model, dataset."""

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "configs" / "toy.yaml"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @classmethod
    def make(cls, root: Path) -> Place:
        place = cls(root)
        place.model.mkdir()
        about = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 2}
        (place.model / "config.json").write_text(json.dumps(about | {"max_position_embeddings": 64}))
        (place.model / "tokenizer.json").write_text(json.dumps(WORDS))
        save_file({"weight": np.zeros((2, 3), np.float32)}, place.model / "model.safetensors")
        place.recipe.parent.mkdir()
        place.recipe.write_text(
            f"name: toy\nrun_dir: {place.runs}\nmodel:\n  path: {place.model}\n"
            "rollout:\n  max_tokens: 8\n  max_model_len: 64\nlearner:\n  groups_per_step: 16\ntracking:\n  wandb: off\n"
        )
        return place

    def tree(self) -> dict[str, tuple[int, bytes]]:
        """Everything below the folder: path to mode and content (a link's target, a folder's emptiness)."""
        found = {}
        for path in sorted(self.root.rglob("*")):
            # SQLite's own: a reader makes them beside a file that it then finds damaged.
            empty_log = path.name.endswith("-wal") and path.stat().st_size == 0
            if "__pycache__" in path.parts or path.name == "lock" or path.name.endswith("-shm") or empty_log:
                continue
            mode = path.lstat().st_mode
            content = bytes(path.readlink()) if path.is_symlink() else path.read_bytes() if path.is_file() else b""
            found[str(path.relative_to(self.root))] = (mode, content)
        return found


def overrides(*texts: str) -> Arrange:
    """``r2vpo train CONFIG texts…``."""
    return lambda place: texts


def command(*words: str) -> Arrange:
    """A command line; ``{root}`` is the folder."""
    return lambda place: Command(word.replace("{root}", str(place.root)) for word in words)


def recipe(text: str | bytes) -> Arrange:
    """Another config file; ``MODEL`` is the sound model."""

    def arrange(place: Place) -> Sequence[str]:
        content = text if isinstance(text, bytes) else text.replace("MODEL", str(place.model)).encode()
        place.recipe.write_bytes(content)
        return ()

    return arrange


def data(content: str | bytes, *texts: str, name: str = "rows.jsonl") -> Arrange:
    """A dataset of one file."""

    def arrange(place: Place) -> Sequence[str]:
        file = place.root / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ("task.name=dataset", f"task.path={file}", "task.eval_prompts=1", *texts)

    return arrange


def file(path: str, content: str | bytes, *texts: str) -> Arrange:
    """A file below the folder, replaced or new."""

    def arrange(place: Place) -> Sequence[str]:
        target = place.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content if isinstance(content, bytes) else content.encode())
        return texts

    return arrange


def changed(path: str, change: Callable[[bytes], bytes]) -> Arrange:
    """A file below the folder with other content."""

    def arrange(place: Place) -> Sequence[str]:
        target = place.root / path
        target.write_bytes(change(target.read_bytes()))
        return ()

    return arrange


def without(path: str) -> Arrange:
    """A file below the folder is gone."""

    def arrange(place: Place) -> Sequence[str]:
        (place.root / path).unlink()
        return ()

    return arrange


def renamed(path: str, name: str) -> Arrange:
    """A file below the folder has another name."""

    def arrange(place: Place) -> Sequence[str]:
        (place.root / path).rename((place.root / path).with_name(name))
        return ()

    return arrange


def model_says(**settings: Any) -> Arrange:
    """The model's config.json with other settings."""
    return changed("model/config.json", lambda old: json.dumps(json.loads(old) | settings).encode())


def together(*parts: Arrange) -> Arrange:
    """Several at once; the words of the last one count."""

    def arrange(place: Place) -> Sequence[str]:
        words: Sequence[str] = ()
        for part in parts:
            words = part(place)
        return words

    return arrange


def ids(rows: Iterable[Row]) -> list[str]:
    return [row.id for row in rows]
