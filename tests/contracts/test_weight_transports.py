"""What every weight transport must do, from the encoder of the learner to the tensors in the engine.

Real are the manifest, the board, `WeightSync` and, for NCCL, vLLM's trainer-side and engine-side classes of its weight
transfer, with a queue in the place of the NCCL communicator. A test with real ones needs two GPUs.
"""

from __future__ import annotations

import asyncio
import queue
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer import nccl_engine

from learner.board import WeightBoard
from learner.publish import BucketEncoder, bucket_names
from r2vpo.records import NO_VERSION, BucketSpec, Canary, TensorSpec, WeightManifest
from rollout.broadcast import NcclSender
from rollout.delivery import WeightSyncFailed, make_delivery
from rollout.nccl_transfer import NcclWeightTransfer
from rollout.sync import WeightSync

CANARY = Canary(token_ids=(1, 2, 3), logprobs=(-0.5, -1.5))
SHAPES = {"embed": (64, 32), "half": (5,), "up": (16, 32)}
"""In buckets of 0.0079 MiB = 8,283.75 bytes, `embed` (8,192) and `half` (10) share one, `up` (2,048) has its own."""


def weights(version: int) -> dict[str, torch.Tensor]:
    """Every number is the version, but for one."""
    tensors = {name: torch.full(shape, float(version)) for name, shape in SHAPES.items()}
    tensors["embed"][3, 5] = 7.25
    tensors["half"] = tensors["half"].bfloat16()
    return tensors


class Learner:
    """What a learner's rank 0 does for a publication."""

    def __init__(self, sender: Any) -> None:
        self.sender = sender
        self.tensors: dict[str, torch.Tensor] = {}

    def buckets(self) -> Iterator[tuple[BucketSpec, memoryview]]:
        specs = [
            TensorSpec(name=name, dtype=str(t.dtype).removeprefix("torch."), shape=tuple(t.shape))
            for name, t in self.tensors.items()
        ]
        encoder = BucketEncoder()
        for names in bucket_names(specs, bucket_mb=0.0079):
            yield encoder.encode({name: self.tensors[name] for name in names})

    def publish(self, version: int) -> tuple[WeightManifest, list[Any]]:
        self.tensors = weights(version)
        kept = [(spec, self.sender.put(payload)) for spec, payload in self.buckets()]
        manifest = WeightManifest(version=version, buckets=tuple(spec for spec, _ in kept), canary=CANARY)
        return manifest, [reference for _, reference in kept if reference is not None]


class CopySender:
    """Stands for the object store, which keeps a copy of every bucket."""

    damage = False

    def open(self, *, rank: int, address: tuple[str, int]) -> None:
        pass

    def put(self, payload: memoryview) -> bytes:
        kept = bytearray(payload)
        kept[-1] ^= self.damage
        return bytes(kept)


class Model(torch.nn.Module):
    """Keeps what vLLM's loader would spread over its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, torch.Tensor] = {}

    def load_weights(self, tensors: Any) -> None:
        self.loaded |= {name: tensor.clone().cpu() for name, tensor in tensors}


class Engine:
    """What `WeightSync` sees of an engine, with vLLM's weight transfer behind it where the transport has one."""

    def __init__(self, transfer: NcclWeightTransfer | None) -> None:
        self.transfer, self.model, self.version = transfer, transfer.model if transfer else Model(), NO_VERSION
        self.gap = 0.0

    async def load(self, updates: Sequence[Mapping[str, Any]], *, version: int) -> None:
        for update in updates:
            if self.transfer is None:
                self.model.load_weights(load_file(update["path"]).items())
            else:
                await asyncio.to_thread(self._receive, self.transfer, dict(update))
        self.version = version

    def _receive(self, transfer: NcclWeightTransfer, update: dict[str, Any]) -> None:
        select(transfer.device)
        transfer.receive_weights(transfer.parse_update_info(update))

    @asynccontextmanager
    async def paused(self):
        yield

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        return np.array(CANARY.logprobs, dtype=np.float32) + np.float32(self.gap)


class Communicator:
    """What broadcasts between threads: rank 0 puts, every other rank takes what was put for it."""

    damage = False

    def __init__(self, rank: int, world_size: int, queues: dict[int, queue.Queue]) -> None:
        self.rank = rank
        self.queues = {peer: queues.setdefault(peer, queue.Queue()) for peer in range(1, world_size)}

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        assert src == 0
        if self.rank == 0:
            sent = tensor.clone()
            sent[-1] ^= self.damage
            for waiting in self.queues.values():
                waiting.put(sent)
        else:
            tensor.copy_(self.queues[self.rank].get(timeout=10))

    def destroy(self) -> None:
        pass


def select(device: torch.device) -> None:
    """Make it this thread's device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class World:
    """A learner and workers with one of the transports between them, by real NCCL where the devices are GPUs."""

    def __init__(
        self, transport: str, monkeypatch: pytest.MonkeyPatch, devices: Sequence[str] = ("cpu", "cpu")
    ) -> None:
        self.transport = transport
        self.board: WeightBoard[Any] = WeightBoard()
        if transport == "nccl":
            transfers = [self._transfer(torch.device(device)) for device in devices]
            if devices[0] == "cpu":
                self._fake_nccl(monkeypatch)
            self.met: list[Mapping[str, Any]] = []

            def meet(init_infos: Sequence[Mapping[str, Any]]) -> None:
                self.met = list(init_infos)
                for transfer, info in zip(transfers, init_infos, strict=True):
                    select(transfer.device)
                    transfer.init_transfer_engine(transfer.parse_init_info(dict(info)))

            self.sender: Any = NcclSender((1,) * len(devices), meet)
        else:
            transfers, self.sender = [None, None], CopySender()
        self.sender.open(rank=0, address=("127.0.0.1", free_port()))
        self.learner = Learner(self.sender)
        self.engines = [Engine(transfer) for transfer in transfers]
        self.syncs = [
            WeightSync(engine, worker=f"rollout-{i}", tolerance=1e-4, delivery=make_delivery(transport))
            for i, engine in enumerate(self.engines)
        ]
        self.mismatches = 0

    def _transfer(self, device: torch.device) -> NcclWeightTransfer:
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config = SimpleNamespace(parallel_config=parallel, model_config=None)
        return NcclWeightTransfer(SimpleNamespace(), config, device, Model())

    def _fake_nccl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        queues: dict[int, queue.Queue] = {}
        monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: Communicator(0, info.world_size, queues))
        monkeypatch.setattr(
            nccl_engine,
            "worker_init_process_group",
            lambda info, parallel: Communicator(parallel.rank + info.rank_offset, info.world_size, queues),
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)

    async def publish(self, version: int) -> None:
        """As `Learners.publish` and the workers' sync loops do it; returns once both workers are through."""
        manifest, references = self.learner.publish(version)
        await self.board.post(manifest, references)
        workers = [asyncio.create_task(self._follow(sync)) for sync in self.syncs]
        if not references:
            await asyncio.to_thread(self.sender.send, self.learner.buckets(), manifest.buckets)
        await asyncio.gather(*workers)

    async def _follow(self, sync: WeightSync) -> None:
        manifest = await self.board.newest(after=sync.stamp, timeout_s=10)
        assert manifest is not None
        payloads = [memoryview(payload) for payload in await self.board.references(manifest.stamp)]
        await sync.apply(manifest, payloads, started_s=0.0, on_mismatch=self._mismatch)

    async def _mismatch(self) -> None:
        self.mismatches += 1


@pytest.fixture(params=["object_store", "nccl"])
def world(request, monkeypatch) -> World:
    return World(request.param, monkeypatch)


async def test_every_version_arrives_bit_for_bit_in_every_engine(world):
    for version in (0, 1):
        await world.publish(version)
        for engine, sync in zip(world.engines, world.syncs, strict=True):
            loaded, sent = engine.model.loaded, weights(version)
            assert loaded.keys() == sent.keys()
            assert all(torch.equal(loaded[name], tensor) for name, tensor in sent.items())
            assert all(loaded[name].dtype == tensor.dtype for name, tensor in sent.items())
            assert (engine.version, sync.version) == (version, version)


async def test_a_version_is_announced_with_the_same_manifest(world):
    manifest, references = world.learner.publish(4)
    assert [[t.name for t in bucket.tensors] for bucket in manifest.buckets] == [["embed", "half"], ["up"]]
    assert [len(reference) for reference in references] == (
        [bucket.num_bytes for bucket in manifest.buckets] if world.transport == "object_store" else []
    )


async def test_a_damaged_bucket_is_named_and_never_proven(world, monkeypatch):
    monkeypatch.setattr(CopySender, "damage", True)
    monkeypatch.setattr(Communicator, "damage", True)
    with pytest.raises((WeightSyncFailed, ValueError), match="the bucket that starts with embed has checksum"):
        await world.publish(1)
    assert [sync.version for sync in world.syncs] == [NO_VERSION, NO_VERSION]


async def test_weights_that_the_canary_does_not_prove_end_the_worker(world):
    world.engines[0].gap = 0.5
    tries = {"object_store": 3, "nccl": 1}[world.transport]
    with pytest.raises(WeightSyncFailed, match=f"rollout-0: after loading version 1 {tries} times"):
        await world.publish(1)
    assert world.mismatches == tries
    assert world.syncs[0].version == NO_VERSION


async def test_every_engine_gets_ranks_of_its_own_behind_the_learner(monkeypatch):
    world = World("nccl", monkeypatch)
    assert [info["rank_offset"] for info in world.met] == [1, 2]
    assert {info["world_size"] for info in world.met} == {3}
    met: list[Mapping[str, Any]] = []
    NcclSender((2, 2), met.extend).open(rank=0, address=("10.0.0.1", 4000))
    assert [info["rank_offset"] for info in met] == [1, 3]
    assert {info["world_size"] for info in met} == {5}
    assert {(info["master_address"], info["master_port"]) for info in met} == {("10.0.0.1", 4000)}


async def test_a_rank_that_does_not_send_meets_nobody_and_joins_every_gathering(monkeypatch):
    met: list[Any] = []
    sender = NcclSender((1,), met.extend)
    sender.open(rank=1, address=("127.0.0.1", 1))
    gathered = iter([None, None])
    sender.send(gathered, ())
    assert met == []
    assert list(gathered) == []


@pytest.mark.gpu
async def test_real_nccl_carries_every_version_between_two_gpus(monkeypatch):
    assert torch.cuda.device_count() >= 2, "NCCL joins GPUs: it takes two, and a process for both"
    world = World("nccl", monkeypatch, devices=("cuda:1",))
    for version in (0, 1):
        await world.publish(version)
        loaded, sent = world.engines[0].model.loaded, weights(version)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in sent.items())
