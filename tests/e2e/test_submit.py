"""A job through Ray's job server, on a head node where r2vpo is not installed: submit, stop, resume, and mistakes."""

from __future__ import annotations

import pytest

from benchmarks.cluster.submit import measure


@pytest.mark.engine
@pytest.mark.slow
def test_a_job_is_submitted_commanded_stopped_and_resumed_through_the_job_server():
    rows = list(measure())
    assert [row for row in rows if not row.ok] == []
    assert {row.name.partition(", ")[0] for row in rows} >= {
        "submit: resumed run finished",
        "submit: unreachable address",
        "submit: run that is over",
    }
