"""What a job brings along to a cluster: the code of this installation, and the local files that its config names.

    installed packages + entry points ──ship_code──▶ folders ─┐
    config, model, data, reward module ─ship_inputs▶ folder ──┴─▶ runtime_env["py_modules"] ──▶ PYTHONPATH of the job

Ray puts the parent of every shipped folder on the PYTHONPATH of the job's processes and of all that they start. The
folder ``r2vpo-….dist-info`` among them is what an installed distribution has: so vLLM finds the weight transfer by its
entry point on nodes where r2vpo is not installed, and no node needs pip or a network for it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from r2vpo.job.config import RunConfig, to_yaml
from r2vpo.job.preflight import read_model
from r2vpo.job.replay_view import size_text
from r2vpo.job.settings import ConfigError

PACKAGES = ("r2vpo", "rollout", "learner", "replay")
INPUTS = "r2vpo_inputs"
"""Folder with config.yaml and what it names."""
LIMIT_BYTES = 90_000_000
"""Of all inputs together. Ray's job server takes 100 MiB (``DASHBOARD_CLIENT_MAX_SIZE``), whatever they compress to."""
PATH_KEYS = ("model.path", "task.path", "task.eval_path")
"""Settings that may name local files."""
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", "*.bin", "*.pt", "*.pth")
"""Pickled weights are refused on every node, so they need not travel."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The files that a config names, and the config as it names them in the shipped folder."""

    config: RunConfig
    sources: dict[str, Path]
    """Setting → what it names here."""
    targets: dict[str, str]
    """Setting → where that lies in the shipped folder."""

    @property
    def num_bytes(self) -> dict[str, int]:
        """Size of what each setting names."""
        return {key: sum(file.stat().st_size for file in _files(path)) for key, path in self.sources.items()}


def ship_code(folder: Path) -> list[Path]:
    """Copies in ``folder`` of the packages and of what makes them an installed distribution."""
    try:
        distribution = metadata.distribution("r2vpo")
    except metadata.PackageNotFoundError:
        raise ConfigError("r2vpo is not installed in this Python (pip install .), so it cannot be shipped") from None
    shipped = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        target = folder / name
        shutil.copytree(spec.submodule_search_locations[0], target, ignore=NOT_SHIPPED)
        shipped.append(target)
    about = folder / f"r2vpo-{distribution.version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: r2vpo\nVersion: {distribution.version}\n")
    (about / "entry_points.txt").write_text(distribution.read_text("entry_points.txt") or "")
    return [*shipped, about]


def gather(config: RunConfig, *, there: frozenset[str] = frozenset()) -> Inputs:
    """What ``config`` names on this machine, but for the settings in ``there``, whose paths are the cluster's.

    Raises ``ConfigError`` if it is wrong, or more than `LIMIT_BYTES`.
    """
    sources, targets = {}, {}
    named = {"model.path": config.model.path, "task.path": config.task.path, "task.eval_path": config.task.eval_path}
    for key, text in named.items():
        if text is None or key in there:
            continue
        path = Path(text)
        if path.exists():
            sources[key], targets[key] = path, f"{key.replace('.', '-')}/{path.name}"
        elif not text.startswith(("/", "~")) and not _may_be_id(text):
            raise ConfigError(
                f"{key}={text} does not exist here (seen from {Path.cwd()}); correct it, or give the absolute path "
                "that it has on the cluster"
            )
    if "model.path" in sources:
        read_model(sources["model.path"])
    if config.task.reward is not None and (module := _local_module(config.task.reward)) is not None:
        sources["task.reward"], targets["task.reward"] = module, module.name
    inputs = Inputs(config=_pointing(config, targets), sources=sources, targets=targets)
    sizes = inputs.num_bytes
    if sum(sizes.values()) > LIMIT_BYTES:
        largest = max(sizes, key=lambda key: sizes[key])
        raise ConfigError(
            f"{largest}={sources[largest]} is {size_text(sizes[largest])}, and a job brings along "
            f"{size_text(LIMIT_BYTES)} at most; put it where every node of the cluster sees it, give that path, and "
            f"say so with --there {largest}"
        )
    return inputs


def ship_inputs(inputs: Inputs, folder: Path) -> Path:
    """Copy of the inputs in ``folder``, with the config."""
    home = folder / INPUTS
    home.mkdir()
    for key, source in inputs.sources.items():
        target = home / inputs.targets[key]
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=NOT_SHIPPED)
        else:
            shutil.copyfile(source, target)
    (home / "config.yaml").write_text(to_yaml(inputs.config), encoding="utf-8")
    return home


def _may_be_id(text: str) -> bool:
    """Whether a model or dataset on the Hugging Face hub may be meant, rather than a file that is missing."""
    looks_like_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", text, flags=re.ASCII) is not None
    return (
        looks_like_id
        and Path(text).suffix not in (".jsonl", ".parquet")
        and not ("/" in text and Path(text).parent.exists())
    )


def _pointing(config: RunConfig, targets: dict[str, str]) -> RunConfig:
    """The config with the shipped files in place of those here."""
    task = config.task
    return replace(
        config,
        model=replace(config.model, path=targets.get("model.path", config.model.path)),
        task=replace(
            task,
            path=targets.get("task.path", task.path),
            eval_path=targets.get("task.eval_path", task.eval_path),
        ),
    )


def _local_module(reward: str) -> Path | None:
    """The file or package in the current directory that ``module:function`` is in; None if it is installed."""
    top = reward.partition(":")[0].partition(".")[0]
    if top in PACKAGES:
        return None
    return next((path for path in (Path.cwd() / f"{top}.py", Path.cwd() / top) if path.exists()), None)


def _files(path: Path) -> list[Path]:
    """The files that would be shipped."""
    if path.is_file():
        return [path]
    found = []
    for folder, folders, names in os.walk(path, followlinks=True):
        skipped = NOT_SHIPPED(folder, [*folders, *names])
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(folder, name) for name in names if name not in skipped]
    return found
