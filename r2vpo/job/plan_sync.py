"""How long the weights of a version travel, at the speed at which this machine copies memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

MEASURE_S = 0.2
PROBE_BYTES = 32 << 20
PUBLISH_COPIES = 3
"""Into a bucket, read for its checksum, into the object store; see `learner.publish`."""
FETCH_COPIES = 2
"""Read for its checksum, written to the file that the engine reads; see `rollout.sync`."""
LOAD_COPIES = 2
"""Out of the file, into the model; see `rollout.weight_transfer`."""
PAUSE_S = 0.046
"""Of the pause, what does not depend on the size: measured on two cores, 20 ms of it a sleep inside vLLM."""


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Seconds that one version takes at least. Networks between machines and busy cores add to it."""

    num_bytes: float
    """Of all weights, in the learner's type."""
    bandwidth: float
    """Bytes per second of a copy."""
    measured: bool
    """False where the bandwidth was given."""

    @property
    def publish_s(self) -> float:
        """From the model into the object store; the learner waits."""
        return PUBLISH_COPIES * self.num_bytes / self.bandwidth

    @property
    def fetch_s(self) -> float:
        """Into the memory of a worker, which goes on generating."""
        return FETCH_COPIES * self.num_bytes / self.bandwidth

    @property
    def pause_s(self) -> float:
        """Into the engine; its generation stands still."""
        return PAUSE_S + LOAD_COPIES * self.num_bytes / self.bandwidth


def copy_bandwidth(measure_s: float = MEASURE_S) -> float:
    """Bytes per second at which this process copies memory, measured for ``measure_s`` seconds."""
    source = np.ones(PROBE_BYTES, dtype=np.uint8)
    target = np.empty_like(source)
    np.copyto(target, source)  # the first copy finds its pages
    copied, started_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started_s) < measure_s or not copied:
        np.copyto(target, source)
        copied += PROBE_BYTES
    return copied / elapsed_s
