"""Datasets: what is read from which file, and how a file that cannot be used is named."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rollout.config import TaskConfig
from rollout.tasks.base import TaskPrompt
from rollout.tasks.factory import make_task

ROWS = [{"prompt": f"{i}+{i}?", "answer": str(2 * i), "source": "school"} for i in range(5)]


def jsonl(folder: Path, *lines: str | bytes | dict, name: str = "rows.jsonl") -> Path:
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    file = folder / name
    file.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in encoded))
    return file


def parquet(folder: Path, columns: dict) -> Path:
    file = folder / "rows.parquet"
    pq.write_table(pa.table(columns), file)
    return file


def dataset(path: str | Path, **settings):
    return make_task(TaskConfig(name="dataset", path=str(path), **{"eval_prompts": 1, **settings}), seed=0)


def both(task) -> tuple[list[TaskPrompt], list[TaskPrompt]]:
    train = [task.prompt(i) for i in range(task.num_prompts)]
    return train, [task.eval_prompt(i) for i in range(task.num_eval_prompts)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_last_rows_are_held_out_and_the_others_trained_on_in_order(tmp_path, kind):
    if kind == "jsonl":
        file = jsonl(tmp_path, *ROWS)
    else:
        file = parquet(tmp_path, {name: [row[name] for row in ROWS] for name in ROWS[0]})
    train, held_out = both(dataset(file, eval_prompts=2))
    assert train == [TaskPrompt(text=f"{i}+{i}?", truth=str(2 * i)) for i in range(3)]
    assert held_out == [TaskPrompt(text="3+3?", truth="6"), TaskPrompt(text="4+4?", truth="8")]


def test_a_file_of_its_own_may_be_held_out(tmp_path):
    other = jsonl(tmp_path, *({"prompt": f"held {i}", "answer": i} for i in range(3)), name="held.jsonl")
    train, held_out = both(dataset(jsonl(tmp_path, *ROWS), eval_path=str(other), eval_prompts=2))
    assert len(train) == 5
    assert [p.text for p in held_out] == ["held 0", "held 1"]
    assert [p.truth for p in held_out] == [0, 1]


def test_further_sets_are_held_out_each_with_its_own_fields(tmp_path, monkeypatch):
    asked = []

    def load(dataset_id, split):
        asked.append((dataset_id, split))
        return [{"question": f"hub {i}", "final_answer": [str(i)]} for i in range(3)]

    monkeypatch.setattr("rollout.tasks.dataset._load", load)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    mine = jsonl(tmp_path, {"prompt": "mine", "answer": 7}, name="mine.jsonl")
    hub = {"path": "org/olympiad", "split": "test", "prompt_field": "question", "truth_field": "final_answer"}
    sets = {"mine": str(mine), "olympiad": hub}
    task = dataset(jsonl(tmp_path, *ROWS), eval_sets=sets, eval_prompts=2, prompt_template="Q: {prompt}")
    assert asked == [("org/olympiad", "test")]
    assert task.eval_sets == {
        "mine": [TaskPrompt(text="Q: mine", truth=7)],
        "olympiad": [TaskPrompt(text="Q: hub 0", truth=["0"]), TaskPrompt(text="Q: hub 1", truth=["1"])],
    }
    assert task.num_prompts == 3, "what training and the task's own evaluation have stays as it was"


def test_a_further_set_that_cannot_be_read_is_named(tmp_path):
    file = jsonl(tmp_path, *ROWS)
    with pytest.raises(ValueError, match=r"^task\.eval_sets\.aime=none\.jsonl does not exist"):
        dataset(file, eval_sets={"aime": "none.jsonl"})
    other = jsonl(tmp_path, {"question": "2"}, name="aime.jsonl")
    with pytest.raises(ValueError, match=r"aime\.jsonl, line 1: field 'prompt' is missing \(there are: question\)"):
        dataset(file, eval_sets={"aime": str(other)})


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"a/b": "x"}, r"task\.eval_sets\.a/b: a set's name has letters"),
        ({"a": 3}, r"task\.eval_sets\.a must be a path or dataset id, or a mapping with such a path, not 3"),
        ({"a": {"split": "test"}}, r"task\.eval_sets\.a must be a path"),
        ({"a": {"path": "x", "spilt": "test"}}, r"task\.eval_sets\.a\.spilt='test' is not one of path, split, prompt"),
    ],
)
def test_a_further_set_that_is_not_well_formed_is_refused(sets, message):
    with pytest.raises(ValueError, match=message):
        TaskConfig(name="dataset", path="x", eval_sets=sets)
    with pytest.raises(ValueError, match=r"task\.name=arithmetic has none beside its own"):
        TaskConfig(eval_sets={"a": "x"})


def test_fields_and_template_are_mapped(tmp_path):
    rows = [{"question": "1+{1}", "gold": {"value": [2]}}] * 2
    template = "Q: {prompt}\nAnswer in \\boxed{{}}."
    task = dataset(jsonl(tmp_path, *rows), prompt_field="question", truth_field="gold", prompt_template=template)
    assert task.prompt(0) == TaskPrompt(text="Q: 1+{1}\nAnswer in \\boxed{}.", truth={"value": [2]})


def test_the_reward_is_math_verify_unless_another_is_named(tmp_path):
    assert dataset(jsonl(tmp_path, *ROWS)).reward == "rollout.tasks.math:verify"


def test_text_is_utf8_and_blank_lines_are_no_rows(tmp_path):
    file = jsonl(tmp_path, json.dumps({"prompt": "é—漢", "answer": "√2"}, ensure_ascii=False), "", "  ", ROWS[0])
    assert dataset(file).prompt(0) == TaskPrompt(text="é—漢", truth="√2")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"answer": "1"}, r"line 2: field 'prompt' is missing \(there are: answer\); .*task\.prompt_field"),
        ({"prompt": "1?"}, r"line 2: field 'answer' is missing \(there are: prompt\); .*task\.truth_field"),
        ({"prompt": "1?", "answer": None}, "line 2: field 'answer' is null"),
        ({"prompt": [{"role": "user"}], "answer": "1"}, "line 2: field 'prompt' is of type list, not text"),
        ('{"prompt": "1?"', "line 2 is not valid JSON .*one object per line"),
        ("[1, 2]", "line 2 is of type list, not an object"),
        (b'{"prompt": "\xff"}', "line 2 is not UTF-8 .byte 13 is 0xff."),
    ],
)
def test_a_line_that_cannot_be_used_is_named_with_file_line_and_field(tmp_path, line, message):
    file = jsonl(tmp_path, ROWS[0], line, ROWS[1])
    with pytest.raises(ValueError, match=message) as caught:
        dataset(file)
    assert str(caught.value).startswith(f"{file}, ")


def test_a_bad_line_of_the_held_out_file_is_named_too(tmp_path):
    other = jsonl(tmp_path, "{}", name="held.jsonl")
    with pytest.raises(ValueError, match=r"held\.jsonl, line 1: field 'prompt' is missing"):
        dataset(jsonl(tmp_path, *ROWS), eval_path=str(other))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": ["a"], "answer": ["1"]}, r"row 1: field 'prompt' is missing .there are: question, answer."),
        ({"prompt": ["a", None], "answer": ["1", "2"]}, "row 2: field 'prompt' is null"),
        ({"prompt": ["a", "b"], "answer": ["1", None]}, "row 2: field 'answer' is null"),
        ({"prompt": ["a"], "answer": [b"raw"]}, "row 1: field 'answer' is no JSON value"),
        ({"prompt": [1], "answer": ["1"]}, "row 1: field 'prompt' is of type int, not text"),
    ],
)
def test_a_parquet_row_that_cannot_be_used_is_named_with_row_and_field(tmp_path, columns, message):
    file = parquet(tmp_path, columns)
    with pytest.raises(ValueError, match=message) as caught:
        dataset(file)
    assert str(caught.value).startswith(f"{file}, ")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"rows\.parquet is not a readable Parquet file"):
        dataset(file)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_an_empty_file_is_named(tmp_path, kind):
    file = jsonl(tmp_path) if kind == "jsonl" else parquet(tmp_path, {"prompt": pa.array([], pa.string())})
    with pytest.raises(ValueError, match=rf"task\.path={file} has no rows"):
        dataset(file)


def test_too_few_rows_to_hold_some_out_say_how_many_there_are(tmp_path):
    with pytest.raises(ValueError, match=r"has 5 rows, and task\.eval_prompts=5 .* lower task\.eval_prompts, or give"):
        dataset(jsonl(tmp_path, *ROWS), eval_prompts=5)


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "missing.parquet", "data/missing.jsonl", "/nowhere/rows", "rows.csv"]
)
def test_a_missing_file_is_named_with_what_was_expected(path):
    with pytest.raises(ValueError, match=rf"task\.path={path} does not exist .*\.jsonl or \.parquet file, or the id"):
        dataset(path)


def test_a_path_that_is_there_and_no_dataset_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is a directory; name a \.jsonl or \.parquet file"):
        dataset(tmp_path)
    file = jsonl(tmp_path, *ROWS, name="rows.txt")
    with pytest.raises(ValueError, match=r"is neither a \.jsonl nor a \.parquet file"):
        dataset(file)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("no place", r"shows the policy no prompt; put \{prompt\} where"),
        ("{prompt} in \\boxed{}", r"only \{prompt\} is replaced, write any other brace twice"),
        ("{prompt} {name}", r"cannot be filled in \(KeyError"),
        ("{prompt", "cannot be filled in"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        dataset(jsonl(tmp_path, *ROWS), prompt_template=template)


def test_a_dataset_has_no_options(tmp_path):
    with pytest.raises(ValueError, match=r"task\.options=\{'digits': 3\}: task\.name=dataset has no options"):
        dataset(jsonl(tmp_path, *ROWS), options={"digits": 3})


class FakeHub:
    """Stands for `datasets` and `huggingface_hub`: one data set, and whether the hub answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, reachable: bool) -> None:
        self.asked: list[tuple[str, str]] = []
        self.config = SimpleNamespace(HF_HUB_OFFLINE=False)
        monkeypatch.setitem(sys.modules, "datasets", self)
        monkeypatch.setitem(sys.modules, "datasets.config", self.config)
        monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=lambda: self))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        self._reachable = reachable

    def dataset_info(self, dataset_id: str, *, timeout: float) -> None:
        if not self._reachable:
            raise OSError("Name or service not known")

    def load_dataset(self, dataset_id: str, *, split: str) -> list[dict]:
        self.asked.append((dataset_id, split))
        if dataset_id != "school/sums":
            raise FileNotFoundError(f"{dataset_id} is not on the hub\nand more")
        return ROWS


@pytest.mark.parametrize("reachable", [True, False])
def test_a_dataset_of_the_hub_is_read_by_its_id_and_from_the_cache_where_the_hub_is_out_of_reach(
    monkeypatch, reachable
):
    hub = FakeHub(monkeypatch, reachable=reachable)
    task = dataset("school/sums", split="test")
    assert hub.asked == [("school/sums", "test")]
    assert hub.config.HF_HUB_OFFLINE is not reachable
    assert task.num_prompts == 4
    assert task.prompt(1) == TaskPrompt(text="1+1?", truth="2")


def test_a_dataset_that_is_not_to_be_had_is_named_in_one_line(monkeypatch):
    FakeHub(monkeypatch, reachable=True)
    message = r"task\.path=school/nothing is no file .*FileNotFoundError: school/nothing is not on the hub\); correct"
    with pytest.raises(ValueError, match=message):
        dataset("school/nothing")


def test_without_the_library_the_hub_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package datasets must be installed"):
        dataset("school/sums")
