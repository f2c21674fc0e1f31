"""Both ends of the NCCL transport, on vLLM's weight-transfer API: the learner broadcasts, all engines receive at once.

    learner rank 0 ──send_weights──▶ NCCL group of all engines' GPUs ──▶ bucket ──checksum──▶ the model's own loader

What travels are the buckets of the manifest, as bytes: the checksums and the loader are those of the object store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerWeightTransferEngine, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)

from r2vpo.checksum import checksum
from r2vpo.records import Buckets, BucketSpec
from rollout.weight_transfer import Loadable, tie_output_head

_TYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of each type's name in a safetensors file the type."""


@dataclass
class BucketUpdateInfo(NCCLWeightTransferUpdateInfo):
    """The buckets of one version: ``names`` are those of their first tensors, ``shapes`` their lengths in bytes."""

    checksums: list[str]
    """One per bucket, as in the manifest."""


class NcclWeightTransfer(NCCLWeightTransferEngine):
    """The engine's end: receives every bucket, checks it, and loads it."""

    update_info_cls = BucketUpdateInfo

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Join the broadcast of every bucket. ``ValueError`` if one is not what the manifest says.

        Every bucket has memory of its own: vLLM's layerwise reload keeps tensors until their layer is complete.
        """
        assert isinstance(update_info, BucketUpdateInfo)
        assert self.model_update_group is not None, "init_transfer_engine comes first"
        buckets = zip(update_info.names, update_info.shapes, update_info.checksums, strict=True)
        for name, (num_bytes,), expected in buckets:
            bucket = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
            self.model_update_group.broadcast(bucket, src=0)
            # Without the library vLLM's communicator does nothing, and says nothing: the checksum does.
            found = checksum(bucket.cpu().numpy().data)
            if found != expected:
                raise ValueError(
                    f"the bucket that starts with {name} has checksum {found} after the broadcast, its manifest says "
                    f"{expected}; see NCCL's log (NCCL_DEBUG=INFO), or set learner.weight_transport=object_store"
                )
            cast("Loadable", self.model).load_weights(tensors_in(bucket).items())

    def finish_weight_update(self) -> None:
        """Process the loaded layers for the kernels, then point a tied output head at the new embedding."""
        super().finish_weight_update()
        if self.model_config.hf_text_config.tie_word_embeddings:
            tie_output_head(self.model)


def tensors_in(bucket: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, where they lie in ``bucket``, uint8 ``[num_bytes]`` on any device."""
    start = 8 + int.from_bytes(bucket[:8].cpu().numpy().tobytes(), "little")
    entries = json.loads(bucket[8:start].cpu().numpy().tobytes())
    del entries["__metadata__"]
    tensors = {}
    for name, entry in entries.items():
        first, last = entry["data_offsets"]
        tensors[name] = bucket[start + first : start + last].view(_TYPES[entry["dtype"]]).view(entry["shape"])
    return tensors


class Channel:
    """The learner's end, on one rank. Rank 0 sends; the others take part in the gathering of the buckets."""

    def __init__(
        self,
        *,
        rank: int,
        address: tuple[str, int],
        gpus_each: Sequence[int],
        meet: Callable[[Sequence[Mapping[str, Any]]], None],
    ) -> None:
        """Returns once all engines have joined. ``meet`` has engine i join with the i-th of what it is given;
        ``gpus_each``: GPUs of every engine.
        """
        self._source = _BucketSource()
        self._engine: TrainerWeightTransferEngine[Any] = WeightTransferTrainerFactory.trainer_init(
            NCCLTrainerInitInfo(*address, world_size=1 + sum(gpus_each), packed=False, rank=rank),
            client=_FleetClient(gpus_each, meet),
            source=self._source,
        )

    def send(self, buckets: Buckets, specs: Sequence[BucketSpec]) -> None:
        """Broadcast all buckets; returns once every engine has received them."""
        self._source.buckets, self._source.specs = buckets, specs
        self._engine.send_weights()


class _BucketSource(WeightSource):
    """Buckets in the place of parameters."""

    buckets: Buckets = ()
    specs: Sequence[BucketSpec] = ()

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(spec.tensors[0].name, torch.uint8, (spec.num_bytes,)) for spec in self.specs]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        for bucket in self.buckets:
            if bucket is None:  # not rank 0
                yield "", torch.empty(0)
            else:
                spec, payload = bucket
                yield spec.tensors[0].name, torch.frombuffer(payload, dtype=torch.uint8).to(device, copy=True)


class _FleetClient:
    """vLLM's ``VLLMWeightSyncClient`` for engines that learn of a version from the board, and then wait for it.

    vLLM's own gives the same rank to every engine: it drives replicas of one engine, which are numbered among them.
    """

    def __init__(self, gpus_each: Sequence[int], meet: Callable[[Sequence[Mapping[str, Any]]], None]) -> None:
        self._gpus_each, self._meet = gpus_each, meet

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._meet([init_info | {"rank_offset": 1 + sum(self._gpus_each[:i])} for i in range(len(self._gpus_each))])

    def start_weight_update(self) -> None:
        """The engine's worker does it."""

    def update_weights(self, update_info: Any) -> None:
        """The engine's worker does it, with the checksums of the manifest."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The engine's worker does it."""
