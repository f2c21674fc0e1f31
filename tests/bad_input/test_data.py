"""Datasets that cannot be trained on."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r2vpo import cli
from tests.bad_input.place import ROW, Row, data, ids, overrides


def parquet(**columns: list) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


SOUND = parquet(prompt=["1"] * 50, answer=["2"] * 50)
LONG = '{"prompt": "' + "1" * 64 + '", "answer": "2"}\n'

ROWS = [
    Row("no path", overrides("task.name=dataset"), "task.name=dataset needs task.path"),
    Row("no file", overrides("task.name=dataset", "task.path=none.jsonl"), "task.path=none.jsonl does not exist"),
    Row("not on the hub", overrides("task.name=dataset", "task.path=no-such-org/none"), "no-such-org/none is no file"),
    Row("a folder", overrides("task.name=dataset", "task.path=configs"), "is a directory; name a .jsonl or .parquet"),
    Row("a device", overrides("task.name=dataset", "task.path=/dev/zero"), "task.path=/dev/zero does not exist"),
    Row("empty", data(""), "has no rows; give it at least one prompt"),
    Row("blank lines", data("\n\n"), "has no rows"),
    Row("one row", data(ROW), "none is left to train on"),
    Row("line 2 cut off", data(ROW + '{"prompt": "1\n' + ROW), "rows.jsonl, line 2 is not valid JSON"),
    Row("line 2 a list", data(ROW + "[1]\n"), "rows.jsonl, line 2 is of type list, not an object"),
    Row("no such field", data(ROW + '{"prompt": "1"}\n'), "line 2: field 'answer' is missing (there are: prompt)"),
    Row("null", data(ROW + '{"prompt": null, "answer": 1}\n'), "line 2: field 'prompt' is null"),
    Row("a number as prompt", data('{"prompt": 3, "answer": 1}\n'), "field 'prompt' is of type int, not text"),
    Row("prompt of length 0", data(ROW + '{"prompt": "", "answer": 1}\n'), "line 2: field 'prompt' is empty"),
    Row("half a character", data('{"prompt": "\\ud800", "answer": 1}\n'), "holds half a character"),
    Row("half a character as truth", data('{"prompt": "1", "answer": "\\udfff"}\n'), "'answer' is no JSON value"),
    Row("NaN as truth", data('{"prompt": "1", "answer": NaN}\n'), "field 'answer' is no JSON value"),
    Row("5000 digits", data('{"prompt": "1", "answer": 1' + "0" * 5000 + "}\n"), "line 1 is not valid JSON"),
    Row("deep", data('{"prompt": "1", "answer": ' + "[" * 200_000 + "\n"), "line 1 is not valid JSON"),
    Row("latin-1", data(ROW.encode() + b'{"prompt": "\xe9"}\n'), "line 2 is not UTF-8 (byte 13 is 0xe9)"),
    Row("UTF-16", data(ROW.encode("utf-16")), "line 1 is not UTF-8 (byte 1 is 0x"),
    Row("zeros", data(bytes(100_000)), "line 1 is not valid JSON"),
    Row("CSV", data("prompt,answer\n1,2\n", name="rows.csv"), "neither a .jsonl nor a .parquet file"),
    Row("pickle", data(b"\x80\x04}.", name="rows.pkl"), "neither a .jsonl nor a .parquet file"),
    Row("gzip", data(b"\x1f\x8b", name="rows.jsonl.gz"), "neither a .jsonl nor a .parquet file"),
    Row("Parquet in name", data("no", name="rows.parquet"), "rows.parquet is not a readable Parquet file"),
    Row("Parquet cut off", data(SOUND[:-20], name="rows.parquet"), "rows.parquet is not a readable Parquet file"),
    Row("Parquet with a hole", data(SOUND[:4] + bytes(60) + SOUND[64:], name="rows.parquet"), "not a readable Parquet"),
    Row(
        "Parquet of others", data(parquet(q=["1"]), name="r.parquet"), "row 1: field 'prompt' is missing (there are: q)"
    ),
    Row(
        "Parquet of bytes", data(parquet(prompt=["1"], answer=[b"2"]), name="r.parquet"), "row 1: field 'answer' is no"
    ),
    Row("shows no prompt", data(ROW * 3, "task.prompt_template=Solve!"), "shows the policy no prompt"),
    Row("half a template", data(ROW * 3, "task.prompt_template={prompt"), "cannot be filled in"),
    Row("template with code", data(ROW * 3, "task.prompt_template={prompt.__class__}"), "shows the policy no prompt"),
    Row("field without name", data(ROW * 3, "task.prompt_field="), "task.prompt_field is empty"),
    Row("held out is missing", data(ROW * 3, "task.eval_path=none.jsonl"), "task.eval_path=none.jsonl does not exist"),
    Row("held out is trained on", data(ROW * 3, "task.eval_path=rows.jsonl"), "the policy would be measured on what"),
    Row("options", data(ROW * 3, "task.options.digits=3"), "task.name=dataset has no options"),
    Row("option of nobody", overrides("task.options.digitz=3"), "did you mean digits?"),
    Row("more than there are", overrides("task.options.digits=1"), "gives only 84 different training prompts"),
    Row("longer than the window", data(LONG * 3), "2 of 2 training prompts leave no room for a response"),
    Row("chat without template", data(ROW * 3, "task.chat=true"), "has no chat template; set task.chat=false"),
]


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_data_that_cannot_be_trained_on_is_named_and_left_alone(row, refused):
    refused(row)


def test_some_prompts_that_are_too_long_are_counted_and_the_first_is_named(place):
    # 63 of 64 tokens leave room for one more; 64 do not
    fits = LONG.replace("1" * 64, "1" * 63)
    words = data(fits + LONG + ROW + LONG + ROW)(place)
    [note] = cli.preflight(cli.load_config(place.recipe, words)).notes
    assert "2 of 4 training prompts leave no room" in note
    assert "the first is prompt 2 with 64 tokens" in note
