"""Weights on their way out: buckets of bytes, and the canary that proves their arrival.

named tensors ──bucket_names──▶ buckets ──encode_bucket──▶ safetensors bytes + BucketSpec ─┐
fixed tokens ──forward pass──▶ Canary ─────────────────────────────────────────────────────┴─▶ WeightManifest

See docs/weights.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod

import numpy as np
from safetensors.torch import save
from torch import Tensor

from r2vpo.checksum import checksum
from r2vpo.records import BucketSpec, TensorSpec

CANARY_LENGTH = 24
"""Most tokens of a canary."""
_CANARY_SEED = 20260103
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}


def bucket_names(tensors: Sequence[TensorSpec], *, bucket_mb: float) -> list[list[str]]:
    """Names of ``tensors`` in order, cut into buckets of at most ``bucket_mb`` MiB; a larger tensor has its own."""
    limit = bucket_mb * 2**20
    buckets: list[list[str]] = []
    filled = limit
    for spec in tensors:
        num_bytes = prod(spec.shape) * _ITEM_BYTES[spec.dtype]
        if not buckets or filled + num_bytes > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(spec.name)
        filled += num_bytes
    return buckets


def encode_bucket(tensors: Mapping[str, Tensor]) -> tuple[BucketSpec, bytes]:
    """One bucket as a safetensors file in memory, and its description."""
    payload = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    specs = tuple(
        TensorSpec(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
        for name, t in tensors.items()
    )
    return BucketSpec(tensors=specs, num_bytes=len(payload), checksum=checksum(payload)), payload


def canary_tokens(prompt: Sequence[int], *, vocab_size: int, special_ids: Collection[int]) -> np.ndarray:
    """int64 ``[T]``: the first tokens of ``prompt``, at most 24; random ordinary ones if it has fewer than two.

    A prompt of the task is a text that the model knows. On tokens drawn at random the activations, and with them the
    rounding errors of float32, can be twenty times as large, and a canary would have to tolerate that much.
    """
    if len(prompt) >= 2:
        return np.array(prompt[:CANARY_LENGTH], dtype=np.int64)
    return random_tokens(vocab_size=vocab_size, special_ids=special_ids)


def random_tokens(*, vocab_size: int, special_ids: Collection[int]) -> np.ndarray:
    """int64 ``[24]``: the same ordinary tokens for every run of a model, so that its canaries can be compared."""
    ordinary = [i for i in range(vocab_size) if i not in special_ids]
    return np.random.default_rng(_CANARY_SEED).choice(ordinary, CANARY_LENGTH).astype(np.int64)
