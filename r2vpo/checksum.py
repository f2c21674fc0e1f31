"""The checksum of a bucket of weights: the learner writes it, whoever loads the bucket compares it."""

from __future__ import annotations

import xxhash

from r2vpo.records import BucketSpec


def checksum(payload: bytes | memoryview) -> str:
    """xxh3-128 of ``payload``, 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(payload)


def verify_bucket(payload: bytes | memoryview, spec: BucketSpec) -> None:
    """Return if ``payload`` is the bucket that ``spec`` describes; ``ValueError`` saying what differs otherwise."""
    view = memoryview(payload)
    if view.nbytes != spec.num_bytes:
        raise ValueError(f"{_name(spec)} has {view.nbytes} bytes, its manifest says {spec.num_bytes}; fetch it again")
    found = checksum(view)
    if found != spec.checksum:
        raise ValueError(f"{_name(spec)} has checksum {found}, its manifest says {spec.checksum}; fetch it again")


def _name(spec: BucketSpec) -> str:
    return f"the bucket that starts with {spec.tensors[0].name}"
