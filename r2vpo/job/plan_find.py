"""Where the model of a plan is described: its directory, the hub's cache, or the hub, of which only config.json."""

from __future__ import annotations

import re
from pathlib import Path

from r2vpo.job.config import ConfigError
from r2vpo.job.plan_model import ModelShape, read_shape
from r2vpo.job.preflight import HUB_TIMEOUT_S, read_model


def find_model(path: str, *, elsewhere: bool) -> tuple[ModelShape, list[str]]:
    """The shape of ``model.path``, and sentences about what is not here.

    With ``elsewhere``, when the run is planned for other machines, config.json is enough. ``ConfigError`` otherwise.
    """
    directory = Path(path)
    if not directory.is_dir():
        if directory.exists():
            raise ConfigError(f"model.path={path} is a file; name the directory that holds config.json")
        directory = _from_hub(path)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.path={directory} has no config.json; name the directory of a Hugging Face model")
    here = any(directory.glob("*.safetensors"))
    if not here and directory == Path(path) and not elsewhere:
        read_model(directory)  # says what is missing
    count = read_model(directory).num_parameters if here else None
    notes = [] if here else [f"model.path={path}: its weights are not here; they are counted from config.json alone"]
    return read_shape(directory, num_parameters=count), notes


def _from_hub(model_id: str) -> Path:
    """The folder of config.json in the hub's cache, fetched if need be."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", model_id, flags=re.ASCII):
        raise ConfigError(f"model.path={model_id} does not exist; name a model directory, or a hub id such as org/name")
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(model_id, "config.json")
    if isinstance(cached, str):
        return Path(cached).parent
    try:
        HfApi().model_info(model_id, timeout=HUB_TIMEOUT_S)  # without a network the download would try for 25 s
        return Path(hf_hub_download(model_id, "config.json", etag_timeout=HUB_TIMEOUT_S)).parent
    except Exception as error:  # noqa: BLE001 - the hub's client lets errors of several libraries through
        raise ConfigError(
            f"model.path={model_id} is no local directory, and as an id on the Hugging Face hub its config.json is "
            f"neither cached nor to be had ({type(error).__name__}); plan where there is a network, or put its "
            "config.json into a folder and add model.path=FOLDER"
        ) from None
