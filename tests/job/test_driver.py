"""Which ends of a session another one cures. Nothing here starts Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from r2vpo.job import driver
from r2vpo.job.component import ComponentDied, ComponentLost
from r2vpo.job.config import ModelConfig, RunConfig, SupervisorConfig
from r2vpo.job.rundir import RunDir
from r2vpo.job.view import PlainView

LATE = ComponentLost("Ray does not start: the current node timed out during startup.")
DEATH = ComponentDied("replay store died: its process was killed or crashed; see logs/error.log")


class FakeSession:
    """Serves, and then comes to the end that its turn has; ``LATE`` comes before there is a session."""

    ends: list[Exception | None]
    has_served = True

    def __init__(self, *_, **__) -> None: ...

    async def work(self, checkpoint: Path | None) -> None:
        if (end := self.ends.pop(0)) is not None:
            raise end


def open_fake(*_) -> None:
    if FakeSession.ends[0] is LATE:
        FakeSession.ends.pop(0)
        raise LATE


async def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *ends: Exception | None) -> int:
    """The exit code of a run whose sessions end so, in this order."""
    FakeSession.ends = list(ends)
    monkeypatch.setattr(driver, "Session", FakeSession)
    monkeypatch.setattr(driver, "open_cluster", open_fake)
    monkeypatch.setattr(driver, "close_cluster", lambda *_, **__: None)
    config = RunConfig(model=ModelConfig(path="x"), supervisor=SupervisorConfig(max_restarts=2, backoff_s=0.0))
    directory = RunDir.create(folder, "run")
    return await driver.Job(config, directory, PlainView(config, directory.path)).run(resume=False)


async def test_a_run_whose_replay_store_dies_goes_on_although_the_next_ray_does_not_start_at_once(
    tmp_path, monkeypatch, capsys
):
    assert await run(tmp_path, monkeypatch, DEATH, LATE, None) == 0
    said = capsys.readouterr()
    assert "replay store died; starting all processes again, from step 0 (1 of 2 within 10 min)" in said.out + said.err
    assert "Ray does not start: the current node" in said.out + said.err
    assert "starting all processes again, from step 0 (2 of 2 within 10 min)" in said.out + said.err


async def test_a_run_that_has_not_served_yet_ends_when_ray_does_not_start(tmp_path, monkeypatch):
    assert await run(tmp_path, monkeypatch, LATE, None) == 1
    assert FakeSession.ends == [None]


async def test_one_end_of_a_session_too_many_ends_the_run(tmp_path, monkeypatch, capsys):
    assert await run(tmp_path, monkeypatch, DEATH, DEATH, LATE, None) == 1
    said = capsys.readouterr()
    assert "run failed 3 times within 10 min, at last so: Ray does not start" in said.out + said.err
