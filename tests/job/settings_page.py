"""Writes docs/settings.md from the sources: ``python -m tests.job.settings_page``."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from r2vpo.job.config import RunConfig
from r2vpo.job.resume import OnResume, on_resume

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """\
# Settings

Every setting of a run. Written from the sources by `python -m tests.job.settings_page`; a test compares the two.

A YAML file holds the sections, and `key=value` on the command line changes single settings; the last one wins:

    r2vpo train configs/quickstart.yaml name=mine learner.steps=200

`r2vpo config CONFIG.yaml [key=value …]` prints all settings of a run as it would have them, checked. YAML is read with
the scalars of version 1.2: `off` is a word, `1e-6` a number. An unknown key is an error that names the nearest one.

`on resume` says what becomes of a changed value when a run goes on (`--resume`): a `free` one is taken; an `asked` one,
by which the run would mean something else from there on, is refused unless `--allow-change KEY` names it, and is then
recorded in `history.jsonl`; a `fixed` one is refused, since the store, the prompts or the checkpoint depend on it.
"""
NAMES = {str: "text", int: "integer", float: "number", bool: "true, false", dict: "mapping", types.NoneType: "null"}


def page(schema: type = RunConfig, class_of: Callable[[str], OnResume] = on_resume) -> str:
    """The whole page: one table for what stands at the top level, then one per section."""
    tables = "\n".join("\n".join(_table(*section, class_of)) for section in _sections(schema))
    return f"{HEAD}\n{tables}"


def _sections(schema: type, prefix: str = "") -> Iterator[tuple[type, str]]:
    """``schema`` and all dataclasses below it, with the prefix of their keys."""
    yield schema, prefix
    for name, hint in get_type_hints(schema).items():
        if is_dataclass(hint):
            assert isinstance(hint, type)
            yield from _sections(hint, f"{prefix}{name}.")


def _table(schema: type, prefix: str, class_of: Callable[[str], OnResume]) -> Iterator[str]:
    """The lines of one section."""
    hints, sentences = get_type_hints(schema), dict(_sentences(schema))
    yield from (f"## {prefix.rstrip('.') or 'Top level'}", "", inspect.getdoc(schema) or "", "")
    yield from ("| setting | type | default | on resume | meaning |", "|---|---|---|---|---|")
    for item in fields(schema):
        if not is_dataclass(hints[item.name]):
            key = f"{prefix}{item.name}"
            cells = (f"`{key}`", _type(hints[item.name]), _default(item), class_of(key).value, sentences[item.name])
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""


def _sentences(schema: type) -> Iterator[tuple[str, str]]:
    """Name of every field with the string literal under it, on one line."""
    [tree] = ast.parse(inspect.getsource(schema)).body
    assert isinstance(tree, ast.ClassDef)
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
            assert isinstance(statement.target, ast.Name)
            assert isinstance(below.value, ast.Constant)
            yield statement.target.id, " ".join(str(below.value.value).split())


def _type(annotation: Any) -> str:
    """``number or null`` for ``float | None``."""
    members = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return " or ".join(NAMES[get_origin(member) or member] for member in members)


def _default(item: Field[Any]) -> str:
    """The default as YAML has it; a setting without one is required."""
    if item.default_factory is not MISSING:
        return f"`{item.default_factory()}`"
    if item.default is MISSING:
        return "required"
    if item.default is None:
        return "`null`"
    return f"`{str(item.default).lower() if isinstance(item.default, bool) else item.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
