from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

from r2vpo import cli
from tests.bad_input.place import Command, Place, Row


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    # A path that was added for the reward of one test must not serve the next.
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    # Where no network is, asking for one takes seconds.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Place.make(tmp_path)


@pytest.fixture
def refused(place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[Row], str]:
    """Runs a row: exit code 2, one line on standard error with its sentence, and the folder as it was."""

    def driver(*args: object, **settings: object) -> NoReturn:
        raise AssertionError("the driver was started")

    module = ModuleType("r2vpo.job.driver")
    module.run_job = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "r2vpo.job.driver", module)
    monkeypatch.setattr(cli, "check_stack", lambda: ())

    def run(row: Row) -> str:
        words = row.given(place)
        before = place.tree()
        code = cli.main(list(words) if isinstance(words, Command) else ["train", str(place.recipe), *words])
        said = capsys.readouterr()
        assert said.err.count("\n") == 1, said.err
        assert said.err.startswith("r2vpo: error: ")
        assert row.says in said.err
        assert (code, said.out) == (2, "")
        assert place.tree() == before
        return said.err

    return run
