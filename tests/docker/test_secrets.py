"""No file of docker/ carries a secret, or an image whose content changes under its name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docker.recipes import DOCKER

FILES = sorted(path for path in DOCKER.rglob("*") if path.is_file())
LITERAL = re.compile(r"\w*(?:token|password|secret|key)\w*[\"']?\s*[:=]\s*[\"']?([\w+/-]{12,})", re.IGNORECASE)
REFERENCES = {"r2vpo-ray-token", "ray_auth_token", "/run/secrets/ray_auth_token", "RAY_AUTH_TOKEN"}
"""Names of secrets, not secrets."""


def literals(text: str) -> set[str]:
    """Values that are written where a secret would be."""
    return set(LITERAL.findall(text)) - REFERENCES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_carries_a_secret(path: Path) -> None:
    assert literals(path.read_text()) == set()
    assert not re.search(r"kind:\s*Secret", path.read_text())


@pytest.mark.parametrize("text", ["RAY_AUTH_TOKEN=0123456789abcdef", 'wandb_api_key: "0123456789abcdef"'])
def test_a_secret_would_be_found(text: str) -> None:
    assert literals(text) == {"0123456789abcdef"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_image_has_a_fixed_tag(path: Path) -> None:
    text = path.read_text()
    images = re.findall(r"(?:image: (?:&\w+ )?|^FROM |--tag )([^\s*]+)", text, re.MULTILINE)
    assert [image for image in images if not re.search(r":\d", image)] == []
    assert "latest" not in text
