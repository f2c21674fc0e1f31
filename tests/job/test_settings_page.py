"""docs/settings.md says what the sources say."""

from __future__ import annotations

from dataclasses import dataclass, field

from r2vpo.job.config import ModelConfig, RunConfig
from r2vpo.job.resume import OnResume
from r2vpo.job.settings import leaves
from tests.job.settings_page import PAGE, page


@dataclass(frozen=True, kw_only=True)
class Inner:
    """An example."""

    size: float | None = 0.5
    """How large (m); `a|b` or null, in words
    over two lines."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    """The whole example."""

    name: str
    """What it is called."""
    inner: Inner = field(default_factory=Inner)
    """A section."""
    flag: bool = False
    """Whether."""
    options: dict[str, int] = field(default_factory=dict)
    """More."""


def test_the_page_on_disk_is_the_one_that_the_sources_give():
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.job.settings_page`"


def test_every_setting_of_a_run_has_one_row():
    text = PAGE.read_text(encoding="utf-8")
    for key, _ in leaves(RunConfig(model=ModelConfig(path="x"))):
        assert text.count(f"\n| `{key}` |") == 1, key


def test_a_section_becomes_a_table():
    assert page(Outer, lambda key: OnResume.FREE).partition("## ")[2] == (
        "Top level\n"
        "\n"
        "The whole example.\n"
        "\n"
        "| setting | type | default | on resume | meaning |\n"
        "|---|---|---|---|---|\n"
        "| `name` | text | required | free | What it is called. |\n"
        "| `flag` | true, false | `false` | free | Whether. |\n"
        "| `options` | mapping | `{}` | free | More. |\n"
        "\n"
        "## inner\n"
        "\n"
        "An example.\n"
        "\n"
        "| setting | type | default | on resume | meaning |\n"
        "|---|---|---|---|---|\n"
        "| `inner.size` | number or null | `0.5` | free | How large (m); `a\\|b` or null, in words over two lines. |\n"
    )
