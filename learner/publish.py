"""Weights on their way out: buckets of bytes, and the canary that proves their arrival.

named tensors ──bucket_names──▶ buckets ──BucketEncoder──▶ safetensors bytes + BucketSpec ─┐
fixed tokens ──forward pass──▶ Canary ─────────────────────────────────────────────────────┴─▶ WeightManifest

See docs/weights.md.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from r2vpo.checksum import checksum
from r2vpo.records import BucketSpec, TensorSpec

CANARY_LENGTH = 24
"""Most tokens of a canary."""
_CANARY_SEED = 20260103
_CODES = {
    "float64": ("F64", 8),
    "int64": ("I64", 8),
    "float32": ("F32", 4),
    "int32": ("I32", 4),
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""Of each type its name in a safetensors file and its bytes."""


def bucket_names(tensors: Sequence[TensorSpec], *, bucket_mb: float) -> list[list[str]]:
    """Names of ``tensors`` in order, cut into buckets of at most ``bucket_mb`` MiB; a larger tensor has its own."""
    limit = bucket_mb * 2**20
    buckets: list[list[str]] = []
    filled = limit
    for spec in tensors:
        num_bytes = _num_bytes(spec)
        if not buckets or filled + num_bytes > limit:
            buckets.append([])
            filled = 0
        buckets[-1].append(spec.name)
        filled += num_bytes
    return buckets


class BucketEncoder:
    """Writes buckets as safetensors files, one after the other into the same memory.

    So a publication takes one bucket of memory besides what gathers its tensors, however many buckets there are.
    """

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def encode(self, tensors: Mapping[str, Tensor]) -> tuple[BucketSpec, memoryview]:
        """One bucket and its description; the bytes are those of this bucket until the next call."""
        specs = [
            TensorSpec(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
            for name, t in tensors.items()
        ]
        # Wide types first, so that every tensor begins at a multiple of its own width.
        ordered = sorted(specs, key=lambda spec: -_CODES[spec.dtype][1])
        header = _header(ordered)
        size = len(header) + sum(map(_num_bytes, specs))
        if self._buffer.nbytes < size:
            self._buffer = np.empty(0, dtype=np.uint8)  # the smaller one goes before the larger one comes
            self._buffer = np.empty(size, dtype=np.uint8)
        self._buffer[: len(header)] = np.frombuffer(header, dtype=np.uint8)
        start = len(header)
        for spec in ordered:
            place = torch.from_numpy(self._buffer[start : start + _num_bytes(spec)])
            place.view(tensors[spec.name].dtype).view(spec.shape).copy_(tensors[spec.name].detach())
            start += _num_bytes(spec)
        payload = self._buffer[:size].data
        return BucketSpec(tensors=tuple(specs), num_bytes=size, checksum=checksum(payload)), payload


def _header(specs: Sequence[TensorSpec]) -> bytes:
    """What a safetensors file begins with: its length and, as JSON, the place of every tensor behind it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + _num_bytes(spec)
        entries[spec.name] = {"dtype": _CODES[spec.dtype][0], "shape": spec.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _num_bytes(spec: TensorSpec) -> int:
    return prod(spec.shape) * _CODES[spec.dtype][1]


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
