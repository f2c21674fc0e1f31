"""Models that cannot be trained, or that nobody should load."""

from __future__ import annotations

import json
import os
import pickle

import pytest

from tests.bad_input.place import (
    WORDS,
    Row,
    changed,
    file,
    ids,
    model_says,
    overrides,
    renamed,
    together,
    without,
)

WEIGHTS, INDEX = "model/model.safetensors", "model/model.safetensors.index.json"
CUT = "model.safetensors is not a complete safetensors file"


class Hostile:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def header(text: str):
    """A safetensors file of nothing but a header."""
    return file(WEIGHTS, len(text).to_bytes(8, "little") + text.encode())


def vocabulary(**more: object):
    return file("model/tokenizer.json", json.dumps(WORDS | more))


ROWS = [
    Row("no folder", overrides("model.path=/no/such/model"), "model.path=/no/such/model does not exist"),
    Row("a file", overrides("model.path=model/config.json"), "is a file; name the directory"),
    Row("another folder", overrides("model.path=configs"), "has no config.json"),
    Row("not on the hub", overrides("model.path=no-such-org/none"), "neither cached nor to be had"),
    Row("no config.json", without("model/config.json"), "has no config.json"),
    Row("config.json cut off", file("model/config.json", "{"), "config.json is not valid JSON"),
    Row("config.json latin-1", file("model/config.json", b'{"a": "\xe9"}'), "config.json is not valid JSON"),
    Row("config.json deep", file("model/config.json", "[" * 200_000), "config.json is not valid JSON"),
    Row("config.json a list", file("model/config.json", "[]"), "config.json is of type list, not an object"),
    Row("no weights", without(WEIGHTS), "has no *.safetensors"),
    Row("only pickled weights", renamed(WEIGHTS, "pytorch_model.bin"), "pickled weights can run code"),
    Row("a pickle as .pt", together(without(WEIGHTS), file("model/w.pt", pickle.dumps(Hostile()))), "has only w.pt"),
    Row("a pickle in disguise", file(WEIGHTS, pickle.dumps(Hostile())), CUT),
    Row("weights empty", file(WEIGHTS, b""), CUT),
    Row("weights cut off", changed(WEIGHTS, lambda old: old[:-4]), CUT),
    Row("header cut off", changed(WEIGHTS, lambda old: old[:20]), CUT),
    Row("header is a list", header("[ 1]"), CUT),
    Row("header without offsets", header('{"w": {"shape": [2]}}'), CUT),
    Row("pointer of git-lfs", file(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "git-lfs"),
    Row("index cut off", file(INDEX, "{"), "model.safetensors.index.json is not valid JSON"),
    Row("index without map", file(INDEX, "{}"), "has no weight_map from tensors to files"),
    Row(
        "index of more files", file(INDEX, '{"weight_map": {"w": "model-2.safetensors"}}'), "lacks model-2.safetensors"
    ),
    Row("index leads out", file(INDEX, '{"weight_map": {"w": "../w.safetensors"}}'), "lacks ../w.safetensors"),
    Row("no tokenizer", without("model/tokenizer.json"), "has no tokenizer"),
    Row("tokenizer cut off", file("model/tokenizer.json", "{"), "tokenizer.json is not valid JSON"),
    Row(
        "tokenizer of another model",
        vocabulary(model=WORDS["model"] | {"vocab": {"1": 0, "<u>": 1, "2": 2}}),
        "tokenizer.json has token 2, but the model's embedding ends at 1 (vocab_size=2",
    ),
    Row("token added", vocabulary(added_tokens=[{"id": 7, "content": "<pad>"}]), "tokenizer.json has token 7"),
    Row("an encoder", model_says(architectures=["BertForMaskedLM"]), "is a BertForMaskedLM, which does not continue"),
    Row("a classifier", model_says(architectures=["Qwen2ForSequenceClassification"]), "does not continue a text"),
    Row("a translator", model_says(is_encoder_decoder=True), "does not continue a text"),
    Row(
        "of nobody", model_says(model_type="nonesuch"), "model_type=nonesuch, which the installed transformers does not"
    ),
    Row(
        "with code of its own",
        model_says(model_type="mine", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"}),
        "brings its own code, which the learner never runs",
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_a_model_that_cannot_be_trained_is_named_and_left_alone(row, refused, place):
    refused(row)
    assert not (place.root / "was-run").exists()
