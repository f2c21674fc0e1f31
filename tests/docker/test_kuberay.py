"""The KubeRay manifests, against KubeRay's definitions, Ray's command line and the settings of the run they start."""

from __future__ import annotations

import copy
import gzip
import os
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.scripts.scripts import start

from r2vpo.job.config import load_config
from tests.docker.recipes import DOCKER, ROOT, instructions, manifest, pins

CLUSTER, JOB = manifest("kuberay/raycluster.yaml"), manifest("kuberay/rayjob.yaml")
SPEC = CLUSTER["spec"]
HEAD = SPEC["headGroupSpec"]
GROUPS = {group["groupName"]: group for group in SPEC["workerGroupSpecs"]}
PODS = {"head": HEAD, **GROUPS}
EVERY = pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
DEFINITIONS = Path(os.environ.get("R2VPO_KUBERAY_CRDS") or ROOT.parent / "shared" / "kuberay")
"""Folder with ``ray.io_rayclusters.yaml`` and ``ray.io_rayjobs.yaml`` of a KubeRay release, gzipped or not."""
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


@cache
def definition(plural: str) -> Draft202012Validator:
    """The validator of version v1; skips the test where there are no definitions."""
    for name, opener in ((f"ray.io_{plural}.yaml.gz", gzip.open), (f"ray.io_{plural}.yaml", open)):
        if (DEFINITIONS / name).is_file():
            with opener(DEFINITIONS / name) as file:
                versions = yaml.load(file, yaml.CSafeLoader)["spec"]["versions"]
            (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
            return Draft202012Validator(closed(schema))
    pytest.skip(f"no KubeRay definition ray.io_{plural}.yaml in {DEFINITIONS}; name their folder in R2VPO_KUBERAY_CRDS")


def closed(schema: Any) -> Any:
    """The schema with unknown fields refused: Kubernetes drops them silently, and a misspelt one has no effect."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    named = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return inner | {"additionalProperties": False} if named and "additionalProperties" not in schema else inner


def errors(plural: str, document: dict[str, Any]) -> set[str]:
    return {f"{error.json_path}: {error.message}" for error in definition(plural).iter_errors(document)}


def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["template"]["spec"]["containers"]
    return only


def quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity such as 32Gi."""
    return int(text[:-2]) * UNITS[text[-2:]]


@pytest.mark.parametrize(("plural", "document"), [("rayclusters", CLUSTER), ("rayjobs", JOB)])
def test_the_manifest_is_what_kuberay_defines(plural: str, document: dict[str, Any]) -> None:
    assert errors(plural, document) == set()


def test_what_kuberay_would_refuse_or_drop_is_found() -> None:
    broken = copy.deepcopy(CLUSTER)
    rollout, learner = broken["spec"]["workerGroupSpecs"]
    rollout["maxReplica"] = 3
    learner["replicas"] = "1"
    del learner["groupName"]
    found = " ".join(errors("rayclusters", broken))
    group = "$.spec.workerGroupSpecs"
    assert f"{group}[0]: Additional properties are not allowed ('maxReplica' was unexpected)" in found
    assert f"{group}[1].replicas: '1' is not of type 'integer'" in found
    assert f"{group}[1]: 'groupName' is a required property" in found


def test_the_job_brings_the_cluster_of_the_other_manifest() -> None:
    assert JOB["spec"]["rayClusterSpec"] == SPEC


def test_rollout_grows_by_itself_while_the_learner_stays() -> None:
    sizes = {name: (g["minReplicas"], g["replicas"], g["maxReplicas"]) for name, g in GROUPS.items()}
    assert sizes == {"rollout": (1, 1, 8), "learner": (1, 1, 1)}
    assert SPEC["enableInTreeAutoscaling"] is True


def test_each_group_has_room_for_the_actors_of_the_run_and_a_unit_of_its_resource_for_each() -> None:
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:2] == ["r2vpo", "train"]
    config = load_config(ROOT / words[2], words[3:])
    assert (config.ray.address, config.run_dir) == ("auto", "/runs")
    asked = {
        "rollout": (config.rollout.workers, config.rollout.num_cpus, config.rollout.num_gpus),
        "learner": (config.learner.ranks, config.learner.num_cpus, config.learner.num_gpus),
    }
    for name, (actors, cpus, gpus) in asked.items():
        group, limits = GROUPS[name], container(GROUPS[name])["resources"]["limits"]
        fit = min(int(limits["cpu"]) / cpus, int(limits["nvidia.com/gpu"]) / (gpus or 1))
        assert group["resources"] == {name: f"{fit:g}"}
        assert actors == group["replicas"] * fit


def test_no_actor_but_driver_and_store_lands_on_the_head() -> None:
    assert HEAD["rayStartParams"]["num-cpus"] == "0"
    assert "nvidia.com/gpu" not in container(HEAD)["resources"]["limits"]


@EVERY
def test_ray_knows_every_start_parameter(pod: dict[str, Any]) -> None:
    words = [f"--{name}={value}" for name, value in pod["rayStartParams"].items()]
    parsed = start.make_context("ray", words).params
    assert {name: str(parsed[name.replace("-", "_")]) for name in pod["rayStartParams"]} == pod["rayStartParams"]


@pytest.mark.parametrize("text", ["raycluster.yaml", "rayjob.yaml"])
def test_token_authentication_is_on_and_the_token_is_in_the_secret_that_the_file_tells_to_make(text: str) -> None:
    assert SPEC["authOptions"] == {"mode": "token", "secretName": "r2vpo-ray-token"}
    made = re.search(r"create secret generic (\S+) --from-literal=(\w+)=", (DOCKER / "kuberay" / text).read_text())
    assert made
    assert made.groups() == ("r2vpo-ray-token", "auth_token")


@EVERY
def test_nothing_is_reachable_from_outside_the_kubernetes_cluster(pod: dict[str, Any]) -> None:
    assert (HEAD["serviceType"], HEAD["enableIngress"]) == ("ClusterIP", False)
    assert HEAD.keys().isdisjoint({"headService", "ingressOptions"})
    assert pod["template"]["spec"].keys().isdisjoint({"hostNetwork", "hostPID", "hostIPC"})
    assert [port for port in container(pod).get("ports", []) if "hostPort" in port] == []


@EVERY
def test_the_user_is_the_one_of_the_image_and_not_root(pod: dict[str, Any]) -> None:
    (user,) = [step.words for step in instructions(DOCKER / "gpu.Dockerfile") if step.verb == "USER"]
    context = pod["template"]["spec"]["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, int(user[0]), int(user[0]))
    assert container(pod)["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


@EVERY
def test_the_object_store_fits_into_shared_memory_and_that_into_the_container(pod: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pod["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(pod)["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    shared = quantity(mounts["/dev/shm"]["emptyDir"]["sizeLimit"])
    resources = container(pod)["resources"]
    assert int(pod["rayStartParams"]["object-store-memory"]) <= 0.8 * shared
    assert shared <= 0.4 * quantity(resources["limits"]["memory"])
    assert resources["requests"] == resources["limits"]


@EVERY
def test_every_node_sees_the_runs(pod: dict[str, Any]) -> None:
    claim = manifest("kuberay/runs.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = {volume["name"]: volume for volume in pod["template"]["spec"]["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container(pod)["volumeMounts"]}
    assert mounts["/runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


@EVERY
def test_image_and_ray_are_the_versions_of_this_checkout(pod: dict[str, Any]) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert container(pod)["image"] == f"r2vpo:{version}-gpu"
    assert f"--tag r2vpo:{version}-gpu" in (DOCKER / "gpu.Dockerfile").read_text()
    assert f"ray=={SPEC['rayVersion']}" in pins(ROOT / "requirements" / "cpu.txt")
