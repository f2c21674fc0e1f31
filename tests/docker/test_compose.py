"""The compose file: what Docker would run, checked against Ray's own command line and the job's settings."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

import click
import pytest
from ray.scripts.scripts import healthcheck, start

from r2vpo.job.config import load_config
from tests.docker.recipes import DOCKER, ROOT, manifest, option

COMPOSE = manifest("compose.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EVERY = pytest.mark.parametrize("service", SERVICES.values(), ids=SERVICES)
NODES = pytest.mark.parametrize("name", ["rollout", "learner"])


def command(name: str) -> list[str]:
    """What follows `ray start`."""
    words = shlex.split(SERVICES[name]["command"])
    assert words[:2] == ["ray", "start"]
    return words[2:]


def parse(ray_command: click.Command, words: list[str]) -> dict[str, Any]:
    """The values of its options; Ray's parser refuses what it does not know."""
    return ray_command.make_context("ray", list(words)).params


def test_there_are_a_head_and_a_node_each_for_rollout_and_learner() -> None:
    assert list(SERVICES) == ["head", "rollout", "learner"]
    assert [parse(start, command(name))["head"] for name in SERVICES] == [True, False, False]
    port = parse(start, command("head"))["port"]
    assert {parse(start, command(name))["address"] for name in ("rollout", "learner")} == {f"head:{port}"}


@NODES
def test_a_node_offers_one_unit_of_its_own_resource_for_its_one_actor(name: str) -> None:
    options = parse(start, command(name))
    assert json.loads(options["resources"]) == {name: 1}
    assert options["num_cpus"] == 1


def test_no_actor_but_driver_and_store_lands_on_the_head() -> None:
    assert parse(start, command("head"))["num_cpus"] == 0


def test_the_nodes_wait_for_a_healthy_head() -> None:
    test = SERVICES["head"]["healthcheck"]["test"]
    assert test[:3] == ["CMD", "ray", "health-check"]
    assert parse(healthcheck, test[3:])["address"] == "head:6379"
    waits = [SERVICES[name]["depends_on"] for name in ("rollout", "learner")]
    assert waits == [{"head": {"condition": "service_healthy"}}] * 2


@EVERY
def test_every_node_asks_for_the_token_that_compose_takes_from_the_environment(service: dict[str, Any]) -> None:
    (secret,) = service["secrets"]
    assert service["environment"] == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"/run/secrets/{secret}"}
    assert COMPOSE["secrets"] == {secret: {"environment": "RAY_AUTH_TOKEN"}}


@EVERY
def test_nothing_listens_outside_the_network_of_the_containers(service: dict[str, Any]) -> None:
    assert service.keys().isdisjoint({"ports", "network_mode", "networks", "privileged", "user", "pid", "ipc"})
    assert "networks" not in COMPOSE
    assert service["cap_drop"] == ["ALL"]


def test_the_dashboard_listens_inside_its_container_only() -> None:
    assert parse(start, command("head"))["dashboard_host"] == "127.0.0.1"


@pytest.mark.parametrize("name", SERVICES)
def test_the_object_store_fits_into_shared_memory(name: str) -> None:
    size = re.fullmatch(r"(\d+)gb", SERVICES[name]["shm_size"])
    assert size
    assert int(option(command(name), "object-store-memory")) <= 0.5 * int(size[1]) * 1024**3


@EVERY
def test_the_image_is_the_one_that_the_head_builds(service: dict[str, Any]) -> None:
    build = SERVICES["head"]["build"]
    assert (DOCKER / build["context"]).resolve() == ROOT
    tag = re.search(r"--tag (\S+)", (ROOT / build["dockerfile"]).read_text())
    assert tag
    assert service["image"] == tag[1]


def test_the_command_in_the_head_of_the_file_runs_on_that_cluster() -> None:
    text = re.sub(r"\\\n#", " ", (DOCKER / "compose.yaml").read_text())
    lines = [shlex.split(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#   docker compose")]
    (nodes,) = [int(option(["--" + words[-1]], "rollout")) for words in lines if "up" in words]
    (words,) = [words[words.index("r2vpo") :] for words in lines if "exec" in words]
    assert words[:2] == ["r2vpo", "train"]
    config = load_config(ROOT / words[2], words[3:])
    assert config.ray.address == "auto"
    assert config.run_dir == "/runs"
    assert config.rollout.workers * config.rollout.num_cpus == nodes * parse(start, command("rollout"))["num_cpus"]
    assert config.learner.ranks * config.learner.num_cpus == parse(start, command("learner"))["num_cpus"]
