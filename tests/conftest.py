"""Order of the tests: what takes milliseconds first, real engines last."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.faults.victims import STARTED

# Ray reads its token once per process: every private Ray of the tests, whoever starts it, has this one.
os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", "the-token-of-all-tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)


@pytest.fixture(autouse=True)
def _no_run_outlives_its_test() -> Iterator[None]:
    """A test that fails leaves a run behind: it is ended, and its reaper ends what belongs to it."""
    yield
    while STARTED:
        if (process := STARTED.pop()).poll() is None:
            process.kill()
            process.wait()
