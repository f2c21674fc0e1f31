"""New weights on their way to four workers on two nodes: what crosses between nodes, and how long a worker pauses.

    publisher ──buckets──▶ object store of the first node ──▶ object stores of two nodes ──▶ two workers on each
              └─manifest─▶ board

Real are the encoder of `learner.publish`, the board, `WeightLink` and `WeightSync`. The weights are random float32 in
the shapes of a Qwen2.5-0.5B. A worker's engine is `CopyEngine`, which does what any must: it takes every tensor from
the files into one of its own. All four fetch at the same time and load in turns, because four engines and their copies
would not fit beside each other here, and would share two cores. Every pause has its own measure: before it, the worker
makes a copy of the same weights (`clone`), which has to find its memory, as a load has to find that of the files.
A copy into tensors that are there already is quicker, and is reported too.

Bytes between nodes are those that Ray's object managers say they received (``ray_object_manager_bytes``), read from
every node before and after.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.request
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from math import prod
from statistics import median
from typing import Any

import numpy as np
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from benchmarks.table import QUICK, Row, at_most, emit, reported
from learner.actor import BoardActor
from learner.publish import BucketEncoder, bucket_names
from r2vpo.job.component import Component
from r2vpo.job.links import WeightLink
from r2vpo.records import NO_VERSION, Canary, TensorSpec, WeightManifest
from rollout.sync import WeightSync

NODES, WORKERS_EACH = 2, 2
LAYERS, HIDDEN, WIDE, KEYS, VOCABULARY = (4, 896, 4864, 128, 16_000) if QUICK else (24, 896, 4864, 128, 151_936)
BUCKET_MB = 64.0 if QUICK else 256.0
LOADS = 3
"""Times that every worker takes the weights, each after a copy to compare with."""
CANARY = Canary(token_ids=(1, 2), logprobs=(-1.0,))
REPORT_MS = 500
"""Between two reports of Ray's own figures (milliseconds)."""
SETTLE_S = 60.0
"""Longest wait for what Ray reports to stand still (seconds)."""
MOST_BYTES, LONGEST_PAUSE = 1.05, 1.5


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's matrices; the head is the embedding."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for i in range(LAYERS):
        block = f"model.layers.{i}"
        for name, shape in (
            ("self_attn.q_proj", (HIDDEN, HIDDEN)),
            ("self_attn.k_proj", (KEYS, HIDDEN)),
            ("self_attn.v_proj", (KEYS, HIDDEN)),
            ("self_attn.o_proj", (HIDDEN, HIDDEN)),
            ("mlp.gate_proj", (WIDE, HIDDEN)),
            ("mlp.up_proj", (WIDE, HIDDEN)),
            ("mlp.down_proj", (HIDDEN, WIDE)),
        ):
            yield f"{block}.{name}.weight", shape


@ray.remote(num_cpus=0)
class Publisher:
    """Stands for the learner's rank 0. It makes every bucket's tensors when their turn comes."""

    def publish(self) -> tuple[WeightManifest, list[ray.ObjectRef]]:
        """Put random weights into the object store of this node, as `learner.trainer` does with trained ones."""
        sizes = dict(shapes())
        specs = [TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in sizes.items()]
        encoder, buckets, references = BucketEncoder(), [], []
        for names in bucket_names(specs, bucket_mb=BUCKET_MB):
            bucket, payload = encoder.encode({name: torch.rand(sizes[name]) for name in names})
            buckets.append(bucket)
            references.append(ray.put(np.frombuffer(payload, dtype=np.uint8)))
        return WeightManifest(version=0, buckets=tuple(buckets), canary=CANARY), references


class CopyEngine:
    """Copies what it loads into tensors of its own."""

    def __init__(self) -> None:
        self.tensors = {name: torch.zeros(shape) for name, shape in shapes()}

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)

    async def load(self, updates: Sequence[Mapping[str, Any]], *, version: int) -> None:
        for update in updates:
            self.take(load_file(update["path"]))

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        yield

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.array(CANARY.logprobs, dtype=np.float32)


@ray.remote(num_cpus=0)
class Worker:
    """Stands for a rollout worker: the way from the board into its engine, without the generation."""

    def __init__(self, board: Component) -> None:
        self._link = WeightLink(board)

    async def fetch(self) -> float:
        """Have the newest version in this node's memory; returns the seconds that took."""
        started_s = time.monotonic()
        manifest = await self._link.newest(after=(0, NO_VERSION), timeout_s=60.0)
        assert manifest is not None
        self._manifest, self._payloads = manifest, await self._link.fetch(manifest)
        return time.monotonic() - started_s

    async def load(self) -> list[tuple[float, float, float]]:
        """Seconds of a copy, of one into memory that is there, and of the pause of the load that followed; per load."""
        torch.set_num_threads(1)
        engine = CopyEngine()
        sync = WeightSync(engine, worker="benchmark", tolerance=1e-4)  # type: ignore[arg-type] - it never generates
        sources = [tensors_in(payload) for payload in self._payloads]
        for tensors in sources:
            engine.take(tensors)  # whoever touches memory first waits for the system to give it
        times: list[tuple[float, float, float]] = []
        for _ in range(LOADS):
            started_s = time.monotonic()
            copies = [tensor.clone() for tensors in sources for tensor in tensors.values()]
            copied_s = time.monotonic()
            for tensors in sources:
                engine.take(tensors)
            taken_s = time.monotonic()
            del copies
            await sync.apply(self._manifest, self._payloads, started_s=time.monotonic(), on_mismatch=_never)
            [record] = sync.take_records()
            times.append((copied_s - started_s, taken_s - copied_s, record.pause_s))
        return times


async def _never() -> None:
    raise AssertionError("this canary cannot fail")


def tensors_in(payload: memoryview) -> dict[str, torch.Tensor]:
    """The float32 tensors of a safetensors file, where they lie."""
    begin = 8 + int.from_bytes(payload[:8], "little")
    entries = json.loads(bytes(payload[8:begin]))
    del entries["__metadata__"]
    values = torch.frombuffer(payload[begin:], dtype=torch.float32)
    places = {name: entry["data_offsets"][0] // 4 for name, entry in entries.items()}
    return {
        name: values[places[name] : places[name] + prod(entry["shape"])].view(entry["shape"])
        for name, entry in entries.items()
    }


def measure() -> Iterator[Row]:
    store = int(3 * model_bytes())  # Ray begins to write to disk when it is nearly full
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 1,
            "resources": {"learner": 1},
            "object_store_memory": store,
            "_system_config": {"metrics_report_interval_ms": REPORT_MS},
        },
    )
    for node in range(NODES):
        cluster.add_node(num_cpus=1, resources={f"rollout{node}": WORKERS_EACH}, object_store_memory=store)
    ray.init(address=cluster.address, log_to_driver=False, namespace="r2vpo")
    try:
        yield from rows(*asyncio.run(journey()))
    finally:
        ray.shutdown()
        cluster.shutdown()


async def journey() -> tuple[float, float, list[float], list[tuple[float, float, float]]]:
    """Bytes that crossed between nodes; seconds of the publication, of every fetch, of all copies and pauses."""
    board = Component(name="weight board", actor=BoardActor.options(resources={"learner": 0.1}).remote())
    publisher: Any = Publisher.options(resources={"learner": 0.1}).remote()
    kinds = [Worker.options(resources={f"rollout{node}": 1}) for node in range(NODES)]
    workers: list[Any] = [kind.remote(board) for kind in kinds for _ in range(WORKERS_EACH)]
    await asyncio.gather(*(actor.__ray_ready__.remote() for actor in (publisher, *workers)))
    before = received_bytes()
    started_s = time.monotonic()
    manifest, references = await publisher.publish.remote()
    publish_s = time.monotonic() - started_s
    await board.ask("post", manifest, references)
    fetches = await asyncio.gather(*(worker.fetch.remote() for worker in workers))
    times = [load for worker in workers for load in await worker.load.remote()]
    return settled_bytes() - before, publish_s, fetches, times


def rows(
    crossed: float, publish_s: float, fetches: list[float], times: list[tuple[float, float, float]]
) -> Iterator[Row]:
    size = model_bytes()
    copies, quick, pauses = zip(*times, strict=True)
    name = f"weights: {size / 4e9:.2f} B float32 parameters to {NODES * WORKERS_EACH} workers on {NODES} nodes"
    print(f"copies {copies}, warm {quick}, pauses {pauses}, fetches {fetches} s; {crossed:.0f} bytes", file=sys.stderr)
    ratios = [pause / copy for copy, _, pause in times]
    yield at_most(f"{name}: bytes between nodes", crossed / size / NODES, "x model x nodes", MOST_BYTES)
    yield at_most(f"{name}: pause", median(ratios), "x a copy, median", LONGEST_PAUSE)
    yield reported(f"{name}: pause", median(pause / warm for _, warm, pause in times), "x a warm copy")
    yield reported(f"{name}: longest pause", max(pauses), "s")
    yield reported(f"{name}: copy in memory", median(copies), "s, median")
    yield reported(f"{name}: publication", publish_s, "s, making them too")
    yield reported(f"{name}: fetch, all at once", max(fetches), "s")


def model_bytes() -> int:
    return 4 * sum(prod(shape) for _, shape in shapes())


def settled_bytes() -> float:
    """`received_bytes`, once two reports in a row say the same."""
    deadline_s, last = time.monotonic() + SETTLE_S, -1.0
    while (now := received_bytes()) != last and time.monotonic() < deadline_s:
        last = now
        time.sleep(4 * REPORT_MS / 1000)
    return now


def received_bytes() -> float:
    """Bytes that the object managers of all nodes have received from others."""
    total = 0.0
    for node in ray.nodes():
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(url, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        mine = [line for line in lines if line.startswith("ray_object_manager_bytes") and 'Type="Received"' in line]
        total += sum(float(line.rpartition(" ")[2]) for line in mine)
    return total


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="The given buffer is not writable")
    emit(measure())
