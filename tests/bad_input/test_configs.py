"""Config files, overrides, run names and run folders that cannot be meant."""

from __future__ import annotations

import pytest

from r2vpo import cli
from tests.bad_input.place import Place, Row, command, file, ids, overrides, recipe


def bomb(levels: int) -> str:
    """Nine values, nine times them, and so on: a few lines that stand for 9 ** levels values."""
    lines = ["    l0: &l0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"    l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "task:\n  options:\n" + "\n".join(lines) + "\nmodel: {path: MODEL}\n"


def link_to_nowhere(place: Place):
    place.runs.mkdir()
    (place.runs / "toy").symlink_to("nowhere")
    return ()


def empty_run(place: Place):
    (place.runs / "toy").mkdir(parents=True)
    return ("--resume",)


MODEL = "model: {path: MODEL}\n"
FILES = [
    Row("no file", command("train", "none.yaml"), "there is no config file none.yaml"),
    Row("a folder", command("train", "{root}"), "is a directory; name a YAML file in it"),
    Row("below a file", command("train", "model/config.json/a.yaml"), "cannot be read: Not a directory"),
    Row("unreadable", command("train", "/proc/self/mem"), "/proc/self/mem cannot be read: "),
    Row("name too long", command("train", "x" * 300), "cannot be read: File name too long"),
    Row("empty", recipe(""), "model.path is required and has no default"),
    Row("only comments", recipe("# nothing\n"), "model.path is required and has no default"),
    Row("binary", recipe(bytes(range(256))), "is not UTF-8 text (invalid start byte at byte 128)"),
    Row("latin-1", recipe("name: é".encode("latin-1")), "is not UTF-8 text"),
    Row("NUL", recipe(b"name: a\0b"), "not valid YAML: unacceptable character #x0000"),
    Row("tab", recipe("model:\n\tpath: x\n"), "toy.yaml:2: not valid YAML: found character '\\t'"),
    Row("not closed", recipe("rollout: {workers: [1"), "not valid YAML"),
    Row("two documents", recipe("name: a\n---\nname: b\n"), "not valid YAML: but found another document"),
    Row("a list", recipe("- name\n"), "the file must be a mapping of settings"),
    Row("a word", recipe("name\n"), "must be a mapping of settings"),
    Row(
        "python call", recipe("name: !!python/object/apply:os.system [touch x]\n" + MODEL), "not valid YAML: could not"
    ),
    Row(
        "python object in options",
        recipe("task: {options: {a: !!python/object/new:os.system [touch x]}}\n" + MODEL),
        "could not determine a constructor",
    ),
    Row("unknown tag", recipe("name: !secret x\n" + MODEL), "could not determine a constructor for the tag '!secret'"),
    Row("tag that fits not", recipe("seed: !!int x\n" + MODEL), "toy.yaml:1: seed=x is no value of kind int"),
    Row("time that is none", recipe("name: !!timestamp x\n" + MODEL), "name=x is no value of kind timestamp"),
    Row("laughs", recipe(bomb(9)), "more than 10000 values once its aliases (*name) are written out"),
    Row("alias of itself", recipe("task: {options: &a {x: *a}}\n" + MODEL), "or an alias of itself"),
    Row("deep", recipe("a: " + "[" * 20_000), "nested more than 50 deep"),
    Row("given twice", recipe("seed: 1\nseed: 2\n" + MODEL), "toy.yaml:2: seed is given twice"),
    Row(
        "option twice",
        recipe("task: {options: {digits: 1, digits: 2}}\n" + MODEL),
        "task.options.digits is given twice",
    ),
    Row("a list as name", recipe("? [a, b]\n: 2\n"), "a setting's name must be a word"),
    Row("unknown key", recipe("wokers: 2\n" + MODEL), "toy.yaml:1: wokers is not a setting"),
    Row("unknown nested", recipe("rollout: {wokers: 2}\n" + MODEL), "did you mean rollout.workers?"),
    Row("section as word", recipe("rollout: 3\n" + MODEL), "rollout=3 must be a mapping of settings"),
    Row("section as list", recipe("rollout: [1]\n" + MODEL), "rollout must be a mapping of settings"),
    Row("mapping as text", recipe("name: {a: b}\n" + MODEL), "toy.yaml:1: name must be text"),
    Row("reference to nothing", recipe("seed: ${learner.stepz}\n" + MODEL), "learner.stepz"),
    Row("reference to itself", recipe("name: ${run_dir}\nrun_dir: ${name}\n" + MODEL), "Recursive interpolation"),
    Row("NUL in a path", recipe('model: {path: "a\\0b"}\n'), "model.path='a\\x00b' holds a NUL character"),
]

OVERRIDES = [
    Row("no value", overrides("learner.steps"), "learner.steps is not an override; write key=value"),
    Row("no key", overrides("=3"), "=3 has no valid key"),
    Row("dots", overrides("..=1"), "has no valid key"),
    Row("section emptied", overrides("model="), "model= is a section; write model.NAME=value"),
    Row("too deep", overrides("rollout.workers.x=1"), "rollout.workers.x is not a setting"),
    Row("with dashes", overrides("--learner.steps=3"), "unknown option --learner.steps (settings are written without"),
    Row("half a list", overrides("rollout.workers=[1"), "rollout.workers=[1 is not a YAML value"),
    Row("a word for a number", overrides("rollout.workers=two"), "rollout.workers=two must be an integer"),
    Row("true for a number", overrides("learner.steps=true"), "learner.steps=true must be an integer"),
    Row("5000 digits", overrides("learner.steps=1" + "0" * 5000), "is no value of kind int"),
    Row("not a number", overrides("learner.lr=.nan"), "learner.lr=nan must be at least 0"),
    Row("infinite", overrides("learner.lr=1e400"), "learner.lr=inf must be a finite number"),
    Row("negative", overrides("learner.steps=-3"), "learner.steps=-3 must be at least 1"),
    Row("CPUs below 0", overrides("rollout.num_cpus=-1"), "rollout.num_cpus=-1.0 must be at least 0"),
    Row("GPUs below 0", overrides("learner.num_gpus=-1"), "learner.num_gpus=-1.0 must be at least 0"),
    Row("cache below 0", overrides("rollout.kv_cache_gb=-1"), "rollout.kv_cache_gb=-1.0 must be greater than 0"),
    Row("more than a GPU", overrides("rollout.gpu_memory_utilization=7"), "must lie between 0.01 and 1"),
    Row(
        "Adam without decay", overrides("learner.adam_beta1=1"), "learner.adam_beta1=1.0 must be at least 0 and below 1"
    ),
    Row("unknown word", overrides("rollout.dtype=int4"), "rollout.dtype=int4 is not one of auto, float32"),
    Row("biased sampling", overrides("rollout.top_p=0.9"), "rollout.top_p=0.9 truncates the sampling distribution"),
    Row(
        "clash in a section",
        overrides("rollout.max_tokens=64"),
        "leaves no room for a prompt in rollout.max_model_len=64",
    ),
    Row(
        "clash of sections",
        overrides("learner.minibatches=17"),
        "learner.minibatches=17 exceeds learner.groups_per_step=16",
    ),
    Row("clash with replay", overrides("replay.capacity_groups=1"), "the learner would wait forever"),
    Row("clash with the model", overrides("rollout.max_model_len=65"), "exceeds the 64 positions of the model"),
    Row("cluster with a size", overrides("ray.address=auto", "ray.num_cpus=4"), "remove one of the two"),
    Row("no cluster", overrides("ray.address="), "ray.address is empty"),
]

NAMES = [
    *(
        Row(f"name {name[:12]!r}", overrides(f"name={name}"), "cannot name a folder; use letters, digits")
        for name in ("../toy", "/abs", "a/../b", "..", "", " ", "a b", "é", ".hidden", "-x", "a\0b", "x" * 129)
    ),
    Row("no run_dir", overrides("run_dir="), "run_dir is empty"),
    Row("run_dir is a file", overrides("run_dir=configs/toy.yaml"), "toy.yaml is a file; name a folder"),
    Row("run_dir below a file", overrides("run_dir=configs/toy.yaml/x"), "toy.yaml is a file; name a folder"),
    Row("run_dir without room", overrides("run_dir=/proc/runs"), "has 0.0 GiB free"),
    Row("run_dir too long", overrides("run_dir=" + "x" * 300), "cannot be a path: File name too long"),
    Row("nobody's home", overrides("run_dir=~nobody-of-this-name/x"), "cannot be a path: Could not determine home"),
    Row("name taken", file("runs/toy/summary.json", "{}"), "name=toy is occupied"),
    Row("name taken by a file", file("runs/toy", "notes"), "name=toy is occupied"),
    Row("name taken by a link", link_to_nowhere, "name=toy is occupied"),
    Row("nothing to resume", overrides("--resume"), "there is no run"),
    Row("no run to resume", empty_run, "there is no run"),
    Row("settings cut off", file("runs/toy/config.yaml", "model: {", "--resume"), "config.yaml:1: not valid YAML"),
]

ROWS = [*FILES, *OVERRIDES, *NAMES]


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_what_cannot_be_meant_is_one_sentence_and_changes_nothing(row, refused):
    refused(row)


def test_the_place_that_the_tables_spoil_is_sound(place, monkeypatch, capsys):
    assert cli.main(["config", str(place.recipe)]) == 0
    assert capsys.readouterr().err == ""
    assert cli.preflight(cli.load_config(place.recipe, ())).num_prompts > 0
