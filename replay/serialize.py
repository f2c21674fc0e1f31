"""TrajectoryGroup ↔ bytes, exactly: one safetensors file per group, no pickle.

The per-token arrays of the n trajectories lie one after the other, trajectory g at ``offset[g]:offset[g + 1]``:

    trajectories of 3 and 2 tokens   ->   token_ids_T [5], loss_mask_T [5], ..., offset [0, 3, 5], reward_G [2]

Everything that is no array (key, prompt, truth, outcomes, responses, …) is one JSON text in the file's metadata.
Equal groups give equal bytes.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from r2vpo.records import Outcome, Trajectory, TrajectoryGroup

FORMAT = 1
"""Version of the payload's layout; a reader refuses any other."""

_KEY = re.compile(r"(0|[1-9][0-9]{0,17})\.(0|[1-9][0-9]{0,17})")
_DTYPES = {
    "token_ids_T": np.dtype(np.int32),
    "loss_mask_T": np.dtype(np.bool_),
    "behavior_logprob_T": np.dtype(np.float32),
    "version_T": np.dtype(np.int32),
}


def parse_key(key: str) -> tuple[int, int]:
    """Epoch and index of a prompt key: ``parse_key("0.17") == (0, 17)``. ``ValueError`` if it is malformed."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise ValueError(
            f"prompt key {key!r} is malformed: it must be EPOCH.INDEX, as prompt_key(epoch, index) makes it"
        )
    return int(match[1]), int(match[2])


def check_group(group: TrajectoryGroup) -> None:
    """``ValueError`` if the group could not be stored and read back exactly, or contradicts its own lease."""
    parse_key(group.key)
    for member, trajectory in enumerate(group.trajectories):
        for name, dtype in _DTYPES.items():
            array = getattr(trajectory, name)
            if array.dtype != dtype or array.ndim != 1:
                raise ValueError(
                    f"group {group.key}, trajectory {member}: {name} is {array.dtype} with shape {array.shape}, "
                    f"it must be {dtype} with one axis"
                )
    if group.oldest_version < group.lease_version:
        raise ValueError(
            f"group {group.key} holds a token of version {group.oldest_version}, older than its "
            f"lease_version={group.lease_version}: its lag would be under-counted"
        )
    _truth_as_json(group)


def encode(group: TrajectoryGroup) -> bytes:
    """The group as a safetensors file. ``ValueError`` as in ``check_group``."""
    check_group(group)
    members = group.trajectories
    tensors = {name: np.concatenate([getattr(t, name) for t in members]) for name in _DTYPES}
    tensors["offset"] = np.cumsum([0, *(t.num_tokens for t in members)], dtype=np.int64)
    tensors["reward_G"] = group.rewards_G
    about = {
        "format": FORMAT,
        "key": group.key,
        "prompt": group.prompt,
        "truth": group.truth,
        "worker": group.worker,
        "lease_version": group.lease_version,
        "outcomes": [t.outcome.value for t in members],
        "responses": [t.response for t in members],
    }
    # ASCII JSON keeps even lone surrogates, which UTF-8 metadata would refuse. One key only: safetensors writes
    # several in random order.
    return save(tensors, metadata={"group": json.dumps(about)})


def decode(payload: bytes) -> TrajectoryGroup:
    """The group that ``encode`` wrote, equal bit for bit. ``ValueError`` for another format version."""
    about = _metadata(payload)
    if about["format"] != FORMAT:
        raise ValueError(f"payload has format {about['format']}, this version of r2vpo reads format {FORMAT}")
    tensors = load(payload)
    bounds = tensors["offset"].tolist()
    trajectories = []
    for g, name in enumerate(about["outcomes"]):
        outcome = Outcome(name)
        span = slice(bounds[g], bounds[g + 1])
        trajectories.append(
            Trajectory(
                **{array: tensors[array][span] for array in _DTYPES},
                outcome=outcome,
                reward=float(tensors["reward_G"][g]) if outcome.has_reward else None,
                response=about["responses"][g],
            )
        )
    return TrajectoryGroup(
        key=about["key"],
        prompt=about["prompt"],
        truth=about["truth"],
        trajectories=tuple(trajectories),
        worker=about["worker"],
        lease_version=about["lease_version"],
    )


def _metadata(payload: bytes) -> dict[str, Any]:
    """The JSON text beside the arrays. safetensors.numpy.load leaves it out; a file starts with its header's length."""
    header_end = 8 + int.from_bytes(payload[:8], "little")
    return json.loads(json.loads(payload[8:header_end])["__metadata__"]["group"])


def _truth_as_json(group: TrajectoryGroup) -> None:
    try:
        exact = json.loads(json.dumps(group.truth)) == group.truth
    except TypeError:
        exact = False
    if not exact:
        raise ValueError(
            f"the truth of group {group.key} is no JSON value and would not be read back as it is: {group.truth!r}; "
            "use text, numbers, true, false, null, lists, and objects with text keys"
        )
