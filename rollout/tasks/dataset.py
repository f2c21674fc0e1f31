"""Prompts from a file or from the Hugging Face hub: JSON lines, Parquet, or a dataset by its id.

Everything is read and checked at once, so that a bad row is named before the job starts, and only the two fields that
count are kept.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout.config import TaskConfig
from rollout.tasks.base import TaskPrompt

Row = tuple[str, Any]
"""A prompt's text, template applied, and its ground truth."""

FILE_TYPES = (".jsonl", ".parquet")
PROMPT_MARK = "\0"
HUB_TIMEOUT_S = 3.0


class DatasetTask:
    """Rows of a dataset in their order. Held out is ``eval_path``, or else the last ``eval_prompts`` rows of ``path``.

    Raises ``ValueError`` naming file, line (1-based; row in Parquet and on the hub) and field of what cannot be used.
    """

    reward = "rollout.tasks.math:verify"

    def __init__(self, config: TaskConfig) -> None:
        if config.options:
            raise ValueError(f"task.options={config.options}: task.name=dataset has no options; set task.options={{}}")
        assert config.path is not None, "the configuration refuses a dataset without a path"
        rows = _read(config.path, config, key="task.path")
        self._sets = {name: _read_set(config, name) for name in config.eval_sets}
        if config.eval_path is not None:
            if Path(config.path).resolve() == Path(config.eval_path).resolve():
                raise ValueError(
                    f"task.eval_path={config.eval_path} is task.path: the policy would be measured on what it is "
                    "trained on; set task.eval_path=null to hold out the last rows"
                )
            self._train = rows
            self._eval = _read(config.eval_path, config, key="task.eval_path")[: config.eval_prompts]
            return
        if len(rows) <= config.eval_prompts:
            raise ValueError(
                f"task.path={config.path} has {len(rows)} rows, and task.eval_prompts={config.eval_prompts} of them "
                "would be held out: none is left to train on; lower task.eval_prompts, or give task.eval_path"
            )
        self._train, self._eval = rows[: -config.eval_prompts], rows[-config.eval_prompts :]

    @property
    def num_prompts(self) -> int:
        """Training rows."""
        return len(self._train)

    @property
    def num_eval_prompts(self) -> int:
        """Held-out rows."""
        return len(self._eval)

    @property
    def eval_sets(self) -> Mapping[str, Sequence[TaskPrompt]]:
        """The first ``eval_prompts`` rows of each of ``task.eval_sets``."""
        return self._sets

    def prompt(self, index: int) -> TaskPrompt:
        """Training row ``index``."""
        text, truth = self._train[index]
        return TaskPrompt(text=text, truth=truth)

    def eval_prompt(self, index: int) -> TaskPrompt:
        """Held-out row ``index``."""
        text, truth = self._eval[index]
        return TaskPrompt(text=text, truth=truth)


def _read_set(config: TaskConfig, name: str) -> list[TaskPrompt]:
    """The prompts of one of ``config.eval_sets``."""
    own = config.eval_set(name)
    assert own.path is not None, "a set without a path is refused"
    rows = _read(own.path, own, key=f"task.eval_sets.{name}")
    return [TaskPrompt(text=text, truth=truth) for text, truth in rows[: config.eval_prompts]]


def _read(path: str, config: TaskConfig, *, key: str) -> list[Row]:
    """All rows of a source; ``key`` names the setting in messages."""
    file = Path(path)
    if file.is_file():
        if file.suffix not in FILE_TYPES:
            raise ValueError(f"{key}={path} is neither a .jsonl nor a .parquet file; convert it to one of them")
        places = _jsonl(file) if file.suffix == ".jsonl" else _parquet(file, config)
    elif file.is_dir():
        raise ValueError(f"{key}={path} is a directory; name a .jsonl or .parquet file in it")
    elif not _may_be_hub_id(path):
        raise ValueError(
            f"{key}={path} does not exist (seen from {Path.cwd()}); name a .jsonl or .parquet file, or the id of a "
            "Hugging Face dataset such as org/name"
        )
    else:
        places = _hub(path, config, key=key)
    rows = list(_rows(places, config))
    if not rows:
        raise ValueError(f"{key}={path} has no rows; give it at least one prompt")
    return rows


def _rows(places: Iterable[tuple[str, Mapping[str, Any]]], config: TaskConfig) -> Iterator[Row]:
    """Check and render every row; ``places`` says where each comes from."""
    shape = _shape(config.prompt_template)
    for place, row in places:
        for field, key in ((config.prompt_field, "prompt_field"), (config.truth_field, "truth_field")):
            if row.get(field) is None:
                problem = "is null" if field in row else f"is missing (there are: {', '.join(row)})"
                raise ValueError(f"{place}: field {field!r} {problem}; correct the row, or set task.{key}")
        prompt, truth = row[config.prompt_field], row[config.truth_field]
        if not isinstance(prompt, str):
            raise ValueError(
                f"{place}: field {config.prompt_field!r} is of type {type(prompt).__name__}, not text; set "
                "task.prompt_field to a field with the prompt as text"
            )
        try:
            json.dumps(truth, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{place}: field {config.truth_field!r} is no JSON value ({error}); store it as text or numbers"
            ) from None
        text = shape.replace(PROMPT_MARK, prompt)
        if not text:
            raise ValueError(f"{place}: field {config.prompt_field!r} is empty; a prompt needs a character at least")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{place}: field {config.prompt_field!r} holds half a character ({prompt[error.start]!r}, a lone "
                "surrogate), which no tokenizer takes; remove it"
            ) from None
        yield text, truth


def _shape(template: str) -> str:
    """The template with the mark of ``PROMPT_MARK`` for ``{prompt}``, and every doubled brace as the one it means."""
    try:
        shape = template.format(prompt=PROMPT_MARK)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(
            f"task.prompt_template={template!r} cannot be filled in ({type(error).__name__}: {error}); only {{prompt}} "
            "is replaced, write any other brace twice, as in \\boxed{{{{}}}}"
        ) from None
    if PROMPT_MARK not in shape:
        raise ValueError(
            f"task.prompt_template={template!r} shows the policy no prompt; put {{prompt}} where it belongs"
        )
    return shape


def _jsonl(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        yield from _json_lines(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None


def _json_lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            place = f"{file}, line {number}"
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{place} is not UTF-8 (byte {error.start + 1} is 0x{line[error.start]:02x}); convert the file"
                ) from None
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place} is not valid JSON ({error}); write one object per line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{place} is of type {type(row).__name__}, not an object; write one object per line")
            yield place, row


def _parquet(file: Path, config: TaskConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow.parquet as pq  # imported late: other tasks need not pay for it
    from pyarrow import ArrowException

    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            wanted = [name for name in (config.prompt_field, config.truth_field) if name in names]
            number = 0
            for batch in table.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    # Every column's name, so that a message can offer those that exist.
                    yield f"{file}, row {number}", row if len(wanted) == 2 else dict.fromkeys(names) | row
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not a readable Parquet file ({reason}); write it again") from None


def _hub(dataset_id: str, config: TaskConfig, *, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(
            f"{key}={dataset_id} is no file (seen from {Path.cwd()}), and for a dataset on the Hugging Face hub the "
            "package datasets must be installed; correct the path, or install datasets"
        )
    try:
        table = _load(dataset_id, config.split)
    except Exception as error:  # noqa: BLE001 - the hub's client lets errors of several libraries through
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise ValueError(
            f"{key}={dataset_id} is no file (seen from {Path.cwd()}), and as a dataset on the Hugging Face hub "
            f"task.split={config.split} of it is not to be had ({type(error).__name__}: {reason}); correct the path, "
            "or fetch it where there is a network"
        ) from None
    for number, row in enumerate(table, start=1):
        yield f"{dataset_id}, row {number}", dict(row)


def _load(dataset_id: str, split: str) -> Iterable[Any]:
    """A split from the hub, or from the cache where the hub is out of reach."""
    import datasets.config  # imported late: it takes seconds
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(dataset_id, timeout=HUB_TIMEOUT_S)
    except Exception:  # noqa: BLE001 - whatever the reason, the cache is what remains
        # Otherwise it would try the hub again and again, half a minute long, before it looks there.
        datasets.config.HF_HUB_OFFLINE = True
    return datasets.load_dataset(dataset_id, split=split)


def _may_be_hub_id(text: str) -> bool:
    """Whether ``name`` or ``org/name`` on the hub is meant, rather than a local file that is missing."""
    if Path(text).suffix in (*FILE_TYPES, ".json", ".csv", ".gz", ".txt"):
        return False
    looks_like_id = re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", text, flags=re.ASCII) is not None
    return looks_like_id and (Path(text).parent == Path() or not Path(text).parent.exists())
