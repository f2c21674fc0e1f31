"""One payload under the audit: from its bytes to what they say, and to sentences about what must hold of its tokens.

The bytes are taken apart here once more, as the safetensors format has them, and not by the code that wrote them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from r2vpo.records import NO_VERSION, Outcome

_DTYPES = {"I32": np.int32, "I64": np.int64, "F32": np.float32, "F64": np.float64, "BOOL": np.bool_}
_ARRAYS = ("token_ids_T", "loss_mask_T", "behavior_logprob_T", "version_T", "offset", "reward_G")
_ABOVE_ZERO = 1e-4
"""What rounding may add to a log-prob of 0 (nats)."""


@dataclass(frozen=True, kw_only=True)
class Payload:
    """A group as its bytes say; the members' tokens lie one after the other."""

    key: str
    lease_version: int
    outcomes: tuple[str, ...]
    mask_T: np.ndarray
    """bool: True where a token was sampled."""
    logprob_T: np.ndarray
    """float32, nats."""
    version_T: np.ndarray
    """int32; ``NO_VERSION`` where the mask is False."""
    member_T: np.ndarray
    """int64: which trajectory a token belongs to."""
    reward_G: np.ndarray
    """float64, NaN where there is no verdict."""

    def columns(self) -> dict[str, Any]:
        """What the group's row must say, by the names of the table."""
        sampled = self.version_T[self.mask_T]
        verdicts = self.reward_G[~np.isnan(self.reward_G)]
        return {
            "lease_version": self.lease_version,
            "oldest_version": int(sampled.min()) if len(sampled) else self.lease_version,
            "newest_version": int(sampled.max()) if len(sampled) else self.lease_version,
            "num_trajectories": len(self.outcomes),
            "num_tokens": len(self.mask_T),
            "num_sampled_tokens": len(sampled),
            "num_with_reward": len(verdicts),
            "has_signal": len(verdicts) >= 2 and bool(verdicts.max() > verdicts.min()),
        }


def parse(payload: bytes) -> Payload:
    """``ValueError`` or ``LookupError`` if the bytes are no group."""
    start = 8 + int.from_bytes(payload[:8], "little")
    header = json.loads(payload[8:start])
    about = json.loads(header["__metadata__"]["group"])
    arrays = {name: _array(payload, start, header[name]) for name in _ARRAYS}
    length_G = np.diff(arrays["offset"])
    lengths = {name: len(arrays[name]) for name in _ARRAYS[:4]} | {"offset": int(arrays["offset"][-1])}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"arrays of one axis differ in length: {lengths}")
    if not len(length_G) == len(about["outcomes"]) == len(arrays["reward_G"]) or (length_G < 0).any():
        raise ValueError(f"{len(about['outcomes'])} outcomes, {len(length_G)} members")
    return Payload(
        key=about["key"],
        lease_version=about["lease_version"],
        outcomes=tuple(about["outcomes"]),
        mask_T=arrays["loss_mask_T"],
        logprob_T=arrays["behavior_logprob_T"],
        version_T=arrays["version_T"],
        member_T=np.repeat(np.arange(len(length_G)), length_G),
        reward_G=arrays["reward_G"],
    )


def token_faults(group: Payload) -> Iterator[str]:
    """Sampled tokens without a finite log-prob or a version, others with one; verdicts that contradict the outcome."""
    mask_T, logprob_T, version_T = group.mask_T, group.logprob_T, group.version_T
    faults = {
        "sampled without a finite log-prob": mask_T & ~np.isfinite(logprob_T),
        "sampled with a log-prob above 0": mask_T & (logprob_T > _ABOVE_ZERO),
        "sampled without a version": mask_T & (version_T < 0),
        "of the prompt with a version": ~mask_T & (version_T != NO_VERSION),
        "of the prompt with a log-prob": ~mask_T & (logprob_T != 0),
    }
    for what, fault_T in faults.items():
        if fault_T.any():
            first = int(np.argmax(fault_T))
            yield f"{_many(int(fault_T.sum()), 'token')} {what}, the first in trajectory {group.member_T[first]}"
    for member, (outcome, reward) in enumerate(zip(group.outcomes, group.reward_G.tolist(), strict=True)):
        if Outcome(outcome).has_reward != np.isfinite(reward):
            yield f"trajectory {member} has outcome {outcome} and reward {reward}"


def span_faults(group: Payload) -> Iterator[str]:
    """Trajectories whose versions fall, and tokens older than the lease."""
    sampled_T = group.mask_T & (group.version_T >= 0)
    version_T, member_T = group.version_T[sampled_T], group.member_T[sampled_T]
    falls = np.flatnonzero((np.diff(version_T) < 0) & (np.diff(member_T) == 0))
    for at in falls[:1]:
        yield (
            f"version {version_T[at + 1]} follows version {version_T[at]} in trajectory {member_T[at]}: "
            "versions of a trajectory never fall"
        )
    older = np.flatnonzero(version_T < group.lease_version)
    for at in older[:1]:
        yield (
            f"a token of version {version_T[at]} in trajectory {member_T[at]} is older than the lease, which was given "
            f"at version {group.lease_version}"
        )


def _array(payload: bytes, start: int, about: dict[str, Any]) -> np.ndarray:
    begin, end = about["data_offsets"]
    dtype = np.dtype(_DTYPES[about["dtype"]])
    if about["shape"] != [(end - begin) // dtype.itemsize]:
        raise ValueError(f"an array has shape {about['shape']}")
    return np.frombuffer(payload, dtype, count=(end - begin) // dtype.itemsize, offset=start + begin)


def _many(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
