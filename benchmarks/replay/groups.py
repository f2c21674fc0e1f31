"""Encoded groups, fast: one group of every shape is encoded, the others differ in their key and checksum alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from r2vpo.records import NO_VERSION, Outcome, Trajectory, TrajectoryGroup, prompt_key
from replay.rows import EncodedGroup, encode_group

MEMBERS = 8
"""Trajectories per group."""


@dataclass(frozen=True)
class _Template:
    before: bytes
    after: bytes
    columns: dict[str, Any]


class GroupMaker:
    """Makes groups of ``MEMBERS`` trajectories of ``num_tokens`` tokens each, an eighth of them the prompt's."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self._templates: dict[tuple[int, int, int], _Template] = {}

    def group(self, key: str, *, version: int, num_right: int) -> TrajectoryGroup:
        """A group whose first ``num_right`` members have reward 1 and the others 0."""
        rng = np.random.default_rng(num_right)
        return TrajectoryGroup(
            key=key,
            prompt="6*7=",
            truth="42",
            trajectories=tuple(self._trajectory(rng, version, float(g < num_right)) for g in range(MEMBERS)),
            worker="worker-0",
            lease_version=version,
        )

    def encoded(self, index: int, *, version: int) -> EncodedGroup:
        """The group of prompt ``index`` in epoch 0; how many of its members are right (1 to 7) follows from the index.

        Costs a copy and a checksum of the payload.
        """
        key = prompt_key(0, index)
        template = self._template(len(key), version, 1 + index % (MEMBERS - 1))
        payload = template.before + key.encode() + template.after
        return EncodedGroup(
            key=key,
            columns=template.columns | {"key": key, "prompt_index": index},
            payload=payload,
            checksum=xxhash.xxh3_128_hexdigest(payload),
        )

    def _template(self, key_length: int, version: int, num_right: int) -> _Template:
        about = (key_length, version, num_right)
        if about not in self._templates:
            key = prompt_key(0, int("9" * (key_length - len("0."))))
            encoded = encode_group(self.group(key, version=version, num_right=num_right))
            quoted = f'\\"{key}\\"'.encode()  # as it stands in the JSON text within the payload's JSON header
            assert encoded.payload.count(quoted) == 1
            at = encoded.payload.index(quoted) + len('\\"')
            self._templates[about] = _Template(
                encoded.payload[:at], encoded.payload[at + key_length :], encoded.columns
            )
        return self._templates[about]

    def _trajectory(self, rng: np.random.Generator, version: int, reward: float) -> Trajectory:
        mask_T = np.arange(self.num_tokens) >= self.num_tokens // 8
        logprob_T = -rng.random(self.num_tokens, dtype=np.float32)
        return Trajectory(
            token_ids_T=rng.integers(150_000, size=self.num_tokens, dtype=np.int32),
            loss_mask_T=mask_T,
            behavior_logprob_T=np.where(mask_T, logprob_T, np.float32(0)),
            version_T=np.where(mask_T, version, NO_VERSION).astype(np.int32),
            outcome=Outcome.SCORED,
            reward=reward,
            response="42",
        )
