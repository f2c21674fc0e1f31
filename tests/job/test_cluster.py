"""The files of a private Ray. Nothing here starts one."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from learner.config import LearnerConfig
from r2vpo.job import cluster
from r2vpo.job.cluster import HOME_PREFIX, Cluster, close_cluster, make_home
from r2vpo.job.component import ComponentLost
from r2vpo.job.config import ConfigError, ModelConfig, RayConfig, RunConfig
from rollout.config import RolloutConfig


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "logs"


def begin(logs: Path, text: str) -> Path:
    """A private Ray begins, and writes a log."""
    home = make_home(logs)
    (home / "session_1" / "logs").mkdir(parents=True)
    (home / "session_1" / "logs" / "raylet.out").write_text(text)
    (home / "session_latest").symlink_to(home / "session_1")
    return home


def test_the_logs_of_ray_are_found_while_it_runs_and_nothing_remains_after_a_good_end(logs):
    home = begin(logs, "hello")
    assert (logs / "ray" / "raylet.out").read_text() == "hello"
    close_cluster(logs, keep_logs=False)
    assert list(logs.iterdir()) == []
    assert not home.exists()


def test_after_a_failure_the_logs_of_ray_stay_with_the_run_until_it_goes_on(logs):
    home = begin(logs, "boom")
    close_cluster(logs, keep_logs=True)
    assert not home.exists()
    assert not (logs / "ray").is_symlink()
    assert (logs / "ray" / "raylet.out").read_text() == "boom"
    begin(logs, "again")
    assert (logs / "ray" / "raylet.out").read_text() == "again"


def test_what_a_killed_process_of_the_run_left_is_removed_when_it_goes_on(logs):
    killed, living = begin(logs, "killed"), begin(logs, "next")
    assert not killed.exists()
    assert Path(os.readlink(logs / "ray")).is_relative_to(living)


def test_a_ray_that_never_wrote_anything_is_no_obstacle(logs):
    home = make_home(logs)
    close_cluster(logs, keep_logs=True)
    assert list(logs.iterdir()) == []
    assert not home.exists()


def test_a_link_to_somewhere_else_is_not_followed(logs, tmp_path):
    foreign = tmp_path / "precious" / "session_latest" / "logs"
    foreign.mkdir(parents=True)
    assert not foreign.parents[1].name.startswith(HOME_PREFIX)
    (logs / "ray").symlink_to(foreign)
    close_cluster(logs, keep_logs=False)
    assert foreign.is_dir()


def test_a_joined_cluster_keeps_its_files_to_itself(logs):
    close_cluster(logs, keep_logs=True)
    assert list(logs.iterdir()) == []


def test_a_job_that_would_never_be_placed_is_refused_with_need_and_supply(monkeypatch):
    # two workers of two GPUs each, and one learner rank of one: 5
    config = RunConfig(model=ModelConfig(path="m"), rollout=RolloutConfig(workers=2, tensor_parallel_size=2))
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 4.0})
    with pytest.raises(ConfigError, match=r"the job needs 5 GPUs .*and the cluster has 4; lower rollout.workers"):
        cluster._check_supply(config, 3.0, None)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0, "GPU": 5.0})
    with pytest.raises(ConfigError, match=r"the job needs 3 CPUs .*and the cluster has 2"):
        cluster._check_supply(config, 3.0, None)
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 3.0, "GPU": 5.0})
    assert cluster._check_supply(config, 3.0, None).on_gpu


def test_a_broadcast_is_refused_where_there_are_no_gpus(monkeypatch):
    config = RunConfig(model=ModelConfig(path="m"), learner=LearnerConfig(weight_transport="nccl"))
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(ConfigError, match=r"nccl broadcasts from GPU to GPU, and this cluster has none; set it to obj"):
        cluster._check_supply(config, 2.0, None)


def test_custom_resources_are_asked_for_and_checked_against_the_cluster(monkeypatch):
    config = RunConfig(
        name="a",
        model=ModelConfig(path="m"),
        rollout=RolloutConfig(workers=3, resources={"rollout": 1.0}),
        ray=RayConfig(address="auto"),
    )
    options = Cluster(on_gpu=False, home=None).options(1, None, resources=config.rollout.resources)
    assert options == {"num_cpus": 1, "num_gpus": 0, "resources": {"rollout": 1.0}}
    supply = {"CPU": 8.0, "rollout": 2.0}
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: supply)
    with pytest.raises(ConfigError, match=r"needs 3 of the Ray resource rollout .* and the cluster has 2; declare it"):
        cluster._check_supply(config, 4, None)
    supply["rollout"] = 3.0
    assert not cluster._check_supply(config, 4, None).on_gpu


def test_a_ray_that_does_not_come_up_in_time_is_one_sentence_and_leaves_no_process(logs, monkeypatch):
    left = []

    def late(_temp_dir, **_):
        wait = [sys.executable, "-c", "import time; time.sleep(1000)"]
        left.extend(subprocess.Popen([*wait, *more]) for more in ([f"--temp-dir={_temp_dir}"], []))
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(cluster.ray, "init", late)
    config = RunConfig(model=ModelConfig(path="anything"))
    with pytest.raises(ComponentLost, match=r"Ray does not start: The current node timed out"):
        cluster.open_cluster(config, logs)
    rays, other = left
    assert rays.wait(10) == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()


def test_what_else_is_wrong_with_the_start_of_ray_keeps_its_type(logs, monkeypatch):
    def wrong(**_):
        raise TypeError("no such option")

    monkeypatch.setattr(cluster.ray, "init", wrong)
    with pytest.raises(TypeError, match="no such option"):
        cluster.open_cluster(RunConfig(model=ModelConfig(path="anything")), logs)
