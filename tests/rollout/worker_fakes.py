"""Everything a rollout worker meets, as fakes in one event loop; ``World`` puts a worker among them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

import numpy as np

from r2vpo.checksum import checksum
from r2vpo.records import (
    BucketSpec,
    Canary,
    Lease,
    LeaseAnswer,
    Outcome,
    Stamp,
    TensorSpec,
    TrajectoryGroup,
    WeightManifest,
    prompt_key,
)
from rollout.config import RolloutConfig
from rollout.generation import Completion, EngineFailed
from rollout.rewards import Verdict
from rollout.sync import WeightSync
from rollout.tasks.base import TaskPrompt
from rollout.worker import ASK_S, RolloutWorker

CANARY = Canary(token_ids=(1, 2, 3), logprobs=(-1.0, -2.0))
CONFIG = RolloutConfig(group_size=2, groups_in_flight=2, max_tokens=4, max_model_len=16, temperature=0.5)


async def until(holds: Callable[[], object]) -> None:
    """Let the loop run until ``holds()``; a test that waits in vain fails instead of hanging."""
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)


async def settle() -> None:
    """Give whatever could happen without outside help the time to happen."""
    for _ in range(50):
        await asyncio.sleep(0)


class FakeTask:
    """Prompt i is the text "i", its truth 10·i; held-out prompts are written "e"i. Their tokens are [i, 9]."""

    num_prompts = 100
    num_eval_prompts = 3
    reward = "none:none"
    eval_sets: Mapping[str, Sequence[TaskPrompt]] = {}

    def prompt(self, index: int) -> TaskPrompt:
        return TaskPrompt(text=str(index), truth=10 * index)

    def eval_prompt(self, index: int) -> TaskPrompt:
        return TaskPrompt(text=f"e{index}", truth=10 * index)


def tokenize(text: str) -> list[int]:
    return [int(text.removeprefix("e")), 9]


class FakeEngine:
    """Member i answers with tokens [50, 60 + i] at ``logprobs``, under the version that is loaded."""

    def __init__(self) -> None:
        self.version = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.requests: list[dict] = []
        self.gaps: list[float] = []
        self.canary_gate = asyncio.Event()
        self.canary_gate.set()
        self.loads: list[tuple[int, list[bytes]]] = []
        self.is_paused = False
        self.error: Exception | None = None
        self.logprobs = [-0.5, -0.25]
        self.dead = asyncio.Event()
        self.probes: list[float] = []
        self.is_wedged = False

    async def generate(self, prompt_token_ids: Sequence[int], **settings) -> list[Completion]:
        self.requests.append({"prompt": list(prompt_token_ids), **settings})
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [
            Completion(
                text=f"answer {i}",
                token_ids_T=np.array([50, 60 + i], dtype=np.int32),
                logprob_T=np.array(self.logprobs, dtype=np.float32),
                version_T=np.full(2, self.version, dtype=np.int32),
                truncated=i == 1,
            )
            for i in range(settings["n"])
        ]

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        assert not self.is_paused, "the canary needs an engine that generates"
        assert tuple(token_ids) == CANARY.token_ids
        await self.canary_gate.wait()
        gap = self.gaps.pop(0) if self.gaps else 0.0
        return np.array(CANARY.logprobs, dtype=np.float32) + np.float32(gap)

    async def load(self, updates: Sequence[Mapping[str, Any]], *, version: int) -> None:
        assert self.is_paused, "weights must not change under a running engine"
        payloads = []
        for update in updates:
            with open(update["path"], "rb") as file:
                payloads.append(file.read())
        self.loads.append((version, payloads))
        self.version = version

    async def watch(self) -> NoReturn:
        await self.dead.wait()
        raise EngineFailed("dead")

    async def probe(self, timeout_s: float) -> float:
        self.probes.append(timeout_s)
        if self.is_wedged:
            raise EngineFailed(f"no token for {timeout_s:g} s")
        return 0.0

    @asynccontextmanager
    async def paused(self):
        self.is_paused = True
        try:
            yield
        finally:
            self.is_paused = False


class FakeStore:
    """Grants the leases put into ``ready``, under whatever version is asked; keeps what is appended and released."""

    def __init__(self) -> None:
        self.ready: list[int] = []
        self.exhausted = False
        self.asks: list[tuple[int, int]] = []
        self.groups: list[TrajectoryGroup] = []
        self.released: list[str] = []
        self.append_error: Exception | None = None
        self.known: set[str] = set()
        self.changed = asyncio.Condition()

    async def grant(self, *indices: int) -> None:
        async with self.changed:
            self.ready += indices
            self.changed.notify_all()

    async def lease(self, *, worker: str, stamp: Stamp, count: int, timeout_s: float) -> LeaseAnswer:
        assert count >= 1
        assert timeout_s == ASK_S
        version = stamp[1]
        self.asks.append((version, count))
        async with self.changed:
            await self.changed.wait_for(lambda: self.ready or self.exhausted)
        taken, self.ready = self.ready[:count], self.ready[count:]
        leases = tuple(
            Lease(key=prompt_key(0, i), epoch=0, index=i, version=version, deadline_s=float("inf")) for i in taken
        )
        reason = "" if len(leases) == count else "the limiter"
        return LeaseAnswer(leases=leases, reason=reason, exhausted=self.exhausted and not leases)

    async def release(self, *, worker: str, keys: tuple[str, ...]) -> None:
        self.released += keys

    async def append(self, group: TrajectoryGroup) -> bool:
        if self.append_error is not None:
            raise self.append_error
        self.groups.append(group)
        return group.key not in self.known


class FakeWeights:
    """Publishes versions whose single bucket is the text of the version."""

    def __init__(self) -> None:
        self.manifest: WeightManifest | None = None
        self.superseded: set[int] = set()
        self.damaged = False
        self.changed = asyncio.Condition()

    async def publish(self, version: int, *, lineage: int = 0) -> None:
        payload = str(version).encode()
        spec = BucketSpec(
            tensors=(TensorSpec(name="w", dtype="float32", shape=(1,)),),
            num_bytes=len(payload),
            checksum=checksum(payload),
        )
        async with self.changed:
            self.manifest = WeightManifest(version=version, lineage=lineage, buckets=(spec,), canary=CANARY)
            self.changed.notify_all()

    async def newest(self, *, after: Stamp, timeout_s: float) -> WeightManifest | None:
        async with self.changed:
            await self.changed.wait_for(lambda: self.manifest is not None and self.manifest.stamp > after)
        return self.manifest

    async def fetch(self, manifest: WeightManifest) -> tuple[memoryview, ...]:
        if manifest.version in self.superseded:
            await self.publish(manifest.version + 1)
            raise LookupError(manifest.version)
        payload = b"x" if self.damaged else str(manifest.version).encode()
        return (memoryview(payload),)


class FakeRewards:
    """Rewards 1, 0, 1, … to the members of a group; or the given verdicts."""

    def __init__(self) -> None:
        self.items: list[tuple[str, object]] = []
        self.verdicts: list[Verdict] | None = None

    async def score(self, items: Sequence[tuple[str, object]]) -> list[Verdict]:
        self.items += items
        return self.verdicts or [Verdict(outcome=Outcome.SCORED, reward=float(i % 2 == 0)) for i in range(len(items))]


class World:
    """A worker and all its fakes."""

    def __init__(self) -> None:
        self.engine, self.store, self.weights, self.rewards = FakeEngine(), FakeStore(), FakeWeights(), FakeRewards()
        self.worker = RolloutWorker(
            "rollout-0",
            config=CONFIG,
            seed=7,
            engine=self.engine,
            task=FakeTask(),
            tokenize=tokenize,
            rewards=self.rewards,  # type: ignore[arg-type]
            prompts=self.store,
            groups=self.store,
            weights=self.weights,
            sync=WeightSync(self.engine, worker="rollout-0", tolerance=1e-4),
            probe_every_s=0.01,
            silent_s=5.0,
        )
        self.run = asyncio.create_task(self.worker.run())

    async def start(self, *indices: int, version: int = 0) -> World:
        """Publish ``version`` and grant the prompts."""
        await self.weights.publish(version)
        await self.store.grant(*indices)
        return self

    async def ended(self) -> None:
        async with asyncio.timeout(5):
            await self.run
