"""Settings from a YAML file and `key=value` overrides into frozen dataclasses, with errors a user can act on.

    YAML file ──┐
                ├─ read against the schema (unknown keys, sections, lines) ─▶ OmegaConf merge (types) ─▶ dataclasses
    key=value ──┘

YAML is read with 1.2 scalars: `off` is a word and `1e-6` a number (YAML 1.1 makes them False and text), a key given
twice is an error, and there are no Python tags. A setting whose type is text takes what was written, as it was written.
Aliases may not make more of a file than it holds, and what looks like a secret is no setting (see `secrets.py`).
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from r2vpo.job import secrets

T = TypeVar("T")
COMMAND_LINE = "command line"
MAX_NODES = 10_000
"""Most values in a file once its aliases are written out; nine aliases of nine each, ten deep, are three billion."""
MAX_DEPTH = 50
"""Deepest nesting of a file."""


class ConfigError(ValueError):
    """Something the user can put right: shown as one message, without a traceback."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1.2 scalars."""


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads back unchanged."""


_SCALARS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
)
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _SCALARS:
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)


def load(schema: type[T], path: Path, overrides: Sequence[str]) -> T:
    """An instance of the dataclass ``schema`` from a YAML file, changed by ``key=value`` overrides.

    Raises ``ConfigError``: the file cannot be read, a key is unknown, a value has the wrong type, a required setting is
    missing, or a check of the dataclasses themselves failed.
    """
    reader = _Reader(schema)
    sources = [("", reader.read_file(path)), *(reader.read_override(text) for text in overrides)]
    base = OmegaConf.structured(schema)
    OmegaConf.set_readonly(base, False)  # frozen dataclasses come as read-only nodes, which refuse the merge
    try:
        for key, source in sources:
            if _is_mapping_type(reader.types.get(key)):
                with read_write(OmegaConf.select(base, key.rpartition(".")[0])):
                    OmegaConf.update(base, key, {}, merge=False)  # given as a whole, it replaces what was there
            base = OmegaConf.merge(base, source)
        if missing := sorted(OmegaConf.missing_keys(base)):
            raise ConfigError(f"{path}: {reader.first_leaf(missing[0])} is required and has no default")
        config = OmegaConf.to_object(base)
    except OmegaConfBaseException as error:
        raise ConfigError(reader.explain(error, path)) from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    assert isinstance(config, schema)
    for key, value in leaves(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{key}={value} must be a finite number")
        for text in _texts(value):
            if sentence := secrets.problem(key, text):
                raise ConfigError(sentence)
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{key}={value!r} holds a NUL character; remove it")
    return config


def dump(config: Any) -> str:
    """The settings as YAML that ``load`` reads back to an equal dataclass."""
    return yaml.dump(
        _escaped(asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False
    )


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting: ``("rollout.workers", 1)``, in the order of the fields."""
    for item in fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _texts(value: Any) -> Iterator[str]:
    """Every text in a setting's value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)


def _escaped(value: Any) -> Any:
    """Values with ``${`` escaped: they are final, not references to be resolved once more."""
    if isinstance(value, str):
        return value.replace("${", "\\${")
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


class _Reader:
    """Reads sources against one schema and remembers where every key was written."""

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.types = dict(_schema_leaves(schema))
        self.written: dict[str, tuple[str, str]] = {}  # dotted key -> (place, text as written)

    def read_file(self, path: Path) -> dict[str, Any]:
        """The settings of a YAML file as a nested mapping."""
        if "=" in path.name and not path.exists():
            raise ConfigError(f"{path} is an override; the config file comes first, then key=value")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ConfigError(f"there is no config file {path}") from None
        except IsADirectoryError:
            raise ConfigError(f"{path} is a directory; name a YAML file in it") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        loader, node = _compose(text, str(path))
        if node is None:
            return {}
        return self._section(loader, node, self.schema, "", str(path))

    def read_override(self, text: str) -> tuple[str, dict[str, Any]]:
        """The key of one ``key=value``, and both as a nested mapping."""
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{COMMAND_LINE}: {text} is not an override; write key=value, such as learner.steps=20")
        parts = key.split(".")
        if not all(re.fullmatch(r"[A-Za-z0-9_-]+", part) for part in parts):
            raise ConfigError(f"{COMMAND_LINE}: {text} has no valid key; write key=value, such as learner.steps=20")
        annotation: Any = self.schema
        for depth, part in enumerate(parts):
            if is_dataclass(annotation):
                hints = get_type_hints(annotation)
                if part not in hints:
                    raise ConfigError(f"{COMMAND_LINE}: {self._unknown('.'.join(parts[: depth + 1]))}")
                annotation = hints[part]
            elif _is_mapping_type(annotation):
                annotation = Any
            elif annotation is not Any:
                raise ConfigError(f"{COMMAND_LINE}: {self._unknown(key)}")
        result = self._override_value(value, annotation, key)
        for part in reversed(parts):
            result = {part: result}
        return key, result

    def _override_value(self, value: str, annotation: Any, key: str) -> Any:
        """The value of an override: YAML, or the bare text where the setting is text."""
        if sentence := secrets.problem(key, value):
            raise ConfigError(f"{COMMAND_LINE}: {sentence}")
        try:
            loader, node = _compose(value, COMMAND_LINE)
        except ConfigError:
            if _wants_text(annotation):  # such as a prompt template that begins with a brace
                return value
            raise ConfigError(f"{COMMAND_LINE}: {key}={value} is not a YAML value") from None
        if node is None and is_dataclass(annotation):
            raise ConfigError(f"{COMMAND_LINE}: {key}= is a section; write {key}.NAME=value")
        if node is None or (_wants_text(annotation) and not isinstance(node, yaml.ScalarNode)):
            self.written[key] = (COMMAND_LINE, value)
            return value if _wants_text(annotation) else None
        return self._value(loader, node, annotation, key, COMMAND_LINE, COMMAND_LINE)

    def _section(self, loader: _Loader, node: yaml.Node, schema: Any, prefix: str, source: str) -> dict[str, Any]:
        """A mapping node as settings of the dataclass ``schema``; an empty section means its defaults."""
        key = prefix.rstrip(".")
        if node.tag == "tag:yaml.org,2002:null":
            return {}
        if not isinstance(node, yaml.MappingNode):
            given = f"{key}={node.value}" if isinstance(node, yaml.ScalarNode) else key or "the file"
            inside = ", ".join(get_type_hints(schema))
            raise ConfigError(f"{_place(source, node)}: {given} must be a mapping of settings ({inside})")
        hints = get_type_hints(schema)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = _place(source, key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: a setting's name must be a word, not a list or a mapping")
            name = key_node.value
            if name not in hints:
                raise ConfigError(f"{place}: {self._unknown(prefix + name)}")
            if name in values:
                raise ConfigError(f"{place}: {prefix}{name} is given twice")
            values[name] = self._value(loader, value_node, hints[name], prefix + name, source, place)
        return values

    def _value(self, loader: _Loader, node: yaml.Node, annotation: Any, key: str, source: str, place: str) -> Any:
        """What a node says about one setting or section."""
        if is_dataclass(annotation):
            return self._section(loader, node, annotation, f"{key}.", source)
        text = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
        if sentence := secrets.problem(key, text):
            raise ConfigError(f"{place}: {sentence}")
        self.written[key] = (place, text)
        if isinstance(node, yaml.MappingNode) and (twice := _given_twice(node)) is not None:
            raise ConfigError(f"{_place(source, twice)}: {key}.{twice.value} is given twice")
        try:
            value = loader.construct_object(node, deep=True)
        except yaml.YAMLError as error:
            raise ConfigError(_syntax(error, source)) from None
        except (ValueError, LookupError, AttributeError):  # whatever PyYAML trips over, such as `!!int x`
            kind = str(node.tag).rpartition(":")[2]
            raise ConfigError(
                f"{place}: {f'{key}={_shortened(text)}' if text else key} is no value of kind {kind}"
            ) from None
        if _wants_text(annotation) and isinstance(node, yaml.ScalarNode) and value is not None:
            return node.value
        return value

    def _unknown(self, key: str) -> str:
        """What to say about a key that is no setting: the nearest one, or what its section holds."""
        if secrets.is_named_like_one(key):
            return f"{key} is not a setting; {secrets.advice(key)}"
        section, _, name = key.rpartition(".")
        same_name = [known for known in self.types if known.rpartition(".")[2] == name]
        siblings = [known for known in self.types if known.rpartition(".")[0] == section]
        near = (
            same_name
            or [f"{section}.{found}".lstrip(".") for found in _close(name, [k.rpartition(".")[2] for k in siblings])]
            or _close(key, list(self.types), cutoff=0.85)
        )
        if near:
            return f"{key} is not a setting; did you mean {near[0]}?"
        inside = [known[len(section) :].lstrip(".") for known in self.types if known.startswith(section)]
        holds = ", ".join(dict.fromkeys(known.partition(".")[0] for known in inside))
        return f"{key} is not a setting; {section or 'the top level'} holds {holds}"

    def first_leaf(self, key: str) -> str:
        """A setting to name for a missing key, which may be a whole section."""
        return next(known for known in self.types if known == key or known.startswith(f"{key}."))

    def explain(self, error: OmegaConfBaseException, path: Path) -> str:
        """An error of OmegaConf in the words of the user: where, which key, which value, what is wanted."""
        key = str(error.full_key or "")
        place, text = self.written.get(key, (str(path), ""))
        if key in self.types and "interpolation" not in type(error).__name__.lower():
            shown = f"{key}={text}" if text else key
            return f"{place}: {shown} must be {_describe(self.types[key])}"
        return f"{place}: {key or 'the settings'}: {str(error).splitlines()[0]}"


def _compose(text: str, source: str) -> tuple[_Loader, yaml.Node | None]:
    """The node tree of a YAML document with the loader that can construct its values."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigError(_syntax(error, source)) from None
    except RecursionError:
        raise ConfigError(f"{source}: nested more than {MAX_DEPTH} deep; no setting is") from None
    if node is not None:
        _check_size(node, source)
    return loader, node


def _check_size(root: yaml.Node, source: str) -> None:
    """Refuse a tree that its aliases make endless or huge."""
    waiting, count = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{_place(source, node)}: nested more than {MAX_DEPTH} deep, or an alias of itself")
        if count > MAX_NODES:
            raise ConfigError(f"{source}: more than {MAX_NODES} values once its aliases (*name) are written out")
        if isinstance(node, yaml.MappingNode):
            waiting += [(part, depth + 1) for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(part, depth + 1) for part in node.value]


def _syntax(error: yaml.YAMLError, source: str) -> str:
    """A YAML error with its line, in one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{source}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}"
    return f"{source}: not valid YAML: {str(error).splitlines()[0]}"


def _given_twice(node: yaml.MappingNode) -> yaml.ScalarNode | None:
    """The first key that repeats an earlier one."""
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                return key
            seen.add(key.value)
    return None


def _shortened(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}…"


def _place(source: str, node: yaml.Node) -> str:
    """``file:line`` of a node, or the command line."""
    return source if source == COMMAND_LINE else f"{source}:{node.start_mark.line + 1}"


def _schema_leaves(schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and type of every setting of a dataclass."""
    for name, annotation in get_type_hints(schema).items():
        if is_dataclass(annotation):
            yield from _schema_leaves(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", annotation


def _close(name: str, known: list[str], cutoff: float = 0.7) -> list[str]:
    return get_close_matches(name, known, n=1, cutoff=cutoff)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union; the type itself where it is none."""
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _wants_text(annotation: Any) -> bool:
    return str in _alternatives(annotation)


def _is_mapping_type(annotation: Any) -> bool:
    return annotation is dict or get_origin(annotation) is dict


def _describe(annotation: Any) -> str:
    """A type in words."""
    names = {int: "an integer", float: "a number", bool: "true, false", str: "text", dict: "a mapping", list: "a list"}
    names[type(None)] = "null"
    words = ", ".join(names[get_origin(member) or member] for member in _alternatives(annotation))
    return " or ".join(words.rsplit(", ", 1))
