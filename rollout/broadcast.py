"""The learner's side of the NCCL transport as the roof passes it on: it brings vLLM along only where it is opened."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from r2vpo.records import Buckets, BucketSpec

if TYPE_CHECKING:
    from rollout.nccl_transfer import Channel


@dataclass
class NcclSender:
    """WeightSender of a fixed fleet: announced versions are broadcast to all engines at once."""

    gpus_each: tuple[int, ...]
    """GPUs of every engine, in the order of ``meet``."""
    meet: Callable[[Sequence[Mapping[str, Any]]], None]
    """Have every engine join the group with what vLLM's ``init_weight_transfer_engine`` takes; waits for all."""
    _channel: Channel | None = field(default=None, init=False, repr=False)

    def open(self, *, rank: int, address: tuple[str, int]) -> None:
        """See ``WeightSender.open``."""
        transfer = importlib.import_module("rollout.nccl_transfer")
        self._channel = transfer.Channel(rank=rank, address=address, gpus_each=self.gpus_each, meet=self.meet)

    def put(self, payload: memoryview) -> None:
        """See ``WeightSender.put``: nothing is kept."""

    def send(self, buckets: Buckets, specs: Sequence[BucketSpec]) -> None:
        """See ``WeightSender.send``."""
        assert self._channel is not None, "open comes first"
        self._channel.send(buckets, specs)
