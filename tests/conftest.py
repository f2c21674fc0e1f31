"""Order of the tests: what takes milliseconds first, real engines last."""

from __future__ import annotations

import os

import pytest

# Ray reads its token once per process: every private Ray of the tests, whoever starts it, has this one.
os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", "the-token-of-all-tests"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)
