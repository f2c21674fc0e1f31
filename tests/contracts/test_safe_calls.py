"""Nothing in this repository opens what can run code: read from the sources, call by call."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("r2vpo", "rollout", "replay", "learner", "benchmarks", "assets", "tools")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

RUNNING_CODE = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
"""Modules whose loading runs what a file says."""
FORBIDDEN = {
    "torch.load": "unpickles",
    "torch.jit.load": "runs what it loads",
    "torch.hub.load": "runs what it loads",
    "yaml.load": "may build any object; use a loader of r2vpo.job.settings",
    "yaml.unsafe_load": "builds any object",
    "yaml.full_load": "builds any object",
    "pandas.read_pickle": "unpickles",
    "pd.read_pickle": "unpickles",
    "os.system": "reads its argument as a shell does",
    "eval": "runs its argument",
    "exec": "runs its argument",
}
LOADERS = {"from_pretrained", "from_config"}
CLASSES_THAT_MAY_RUN_CODE = {"AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AsyncEngineArgs"}


def dotted(node: ast.expr) -> str:
    """``torch.jit.load`` of the expression that says so; what is no name is `?`."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def problems(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and sentence of every call or import that could run what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            if isinstance(node, ast.ImportFrom) and all(alias.name.endswith("Error") for alias in node.names):
                continue  # the name of an exception runs nothing
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in names:
                if name.partition(".")[0] in RUNNING_CODE:
                    yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        name, settings = dotted(node.func), {word.arg: word.value for word in node.keywords}
        if name in FORBIDDEN:
            yield node.lineno, f"{name} {FORBIDDEN[name]}"
        if name.endswith((".load", ".loadtxt", ".genfromtxt")) and "allow_pickle" in settings:
            yield node.lineno, f"{name} is told about pickles"
        if isinstance(shell := settings.get("shell"), ast.Constant) and shell.value:
            yield node.lineno, f"{name} goes through a shell"
        owner, _, method = name.rpartition(".")
        if (owner in CLASSES_THAT_MAY_RUN_CODE and method in LOADERS) or name in CLASSES_THAT_MAY_RUN_CODE:
            yield from ((node.lineno, f"{name}: {p}") for p in trust_problems(settings))


def trust_problems(settings: dict[str | None, ast.expr]) -> Iterator[str]:
    """``trust_remote_code`` is said, and is False or what the user's setting says."""
    trust = settings.get("trust_remote_code")
    if trust is None:
        yield "trust_remote_code is not given"
    elif not (isinstance(trust, ast.Constant) and trust.value is False) and dotted(trust) != "trust_remote_code":
        yield "trust_remote_code is neither False nor the setting"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_call_runs_what_a_file_says(file: Path):
    assert list(problems(ast.parse(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run(text, shell=True)",
        "AutoTokenizer.from_pretrained(path)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_a_call_that_would_is_found(code: str):
    assert len(list(problems(ast.parse(code)))) == 1


def test_deepspeed_is_the_one_that_unpickles_and_its_files_are_looked_at_first():
    calls = {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [dotted(n.func).rpartition(".")[2] for n in ast.walk(node) if isinstance(n, ast.Call)]
                if "load_checkpoint" in names:
                    calls[f"{file.relative_to(ROOT)}:{node.name}"] = [
                        name for name in names if name in ("check_pickles", "load_checkpoint")
                    ]
    assert calls == {"learner/engine.py:load": ["check_pickles", "load_checkpoint"]}


def test_weights_come_from_safetensors_alone():
    said = {
        "learner/engine.py": ("AutoModelForCausalLM.from_pretrained", "use_safetensors", True),
        "rollout/engine.py": ("AsyncEngineArgs", "load_format", "safetensors"),
    }
    for path, (name, setting, value) in said.items():
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        [call] = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and dotted(n.func) == name]
        [given] = [word.value for word in call.keywords if word.arg == setting]
        assert isinstance(given, ast.Constant)
        assert given.value == value
