"""The words of the project as types: what rollout makes, replay keeps and the learner reads.

A trajectory is complete at birth and never mutated. All per-token arrays of one trajectory share one axis: position
``t`` is a token of prompt + response, and ``loss_mask_T`` says which positions train. Suffixes name axes: ``_T`` tokens
of one trajectory, ``_G`` members of a group.

    prompt ──▶ Trajectory × n ──▶ TrajectoryGroup ──append──▶ store
    store ──sample──▶ BatchPlan ──fetch──▶ SampledBatch ──▶ learner
    learner ──▶ WeightManifest + buckets ──▶ rollout workers

Only the standard library and numpy are imported here, so that every room can speak these words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np

NO_VERSION = -1
"""The version of a token that no policy sampled (a prompt token)."""


class Outcome(StrEnum):
    """What became of a trajectory. Only the first two carry a reward: an infrastructure failure is never a 0."""

    SCORED = "scored"
    TRUNCATED = "truncated"
    NO_VERDICT = "no_verdict"
    TIMEOUT = "timeout"
    ERROR = "error"

    @property
    def has_reward(self) -> bool:
        """True for ``scored`` and ``truncated``."""
        return self in (Outcome.SCORED, Outcome.TRUNCATED)


class Kind(StrEnum):
    """How a sampled group stands to the learner: never consumed before, or sampled again."""

    FRESH = "fresh"
    STALE = "stale"


def prompt_key(epoch: int, index: int) -> str:
    """The unique, stable key of a prompt: ``prompt_key(0, 17) == "0.17"``."""
    return f"{epoch}.{index}"


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One task instance, ready to be generated from."""

    index: int
    """Position in the task, 0-based; with the epoch it makes the key."""
    text: str
    """What the policy is shown, before tokenisation."""
    token_ids_T: np.ndarray
    """int32 ``[T]``: the tokenised prompt."""
    truth: Any
    """Ground truth for the reward; a JSON value."""


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One sampled response with its prompt tokens.

    Raises ``ValueError`` when the arrays disagree in length, when outcome and reward contradict each other, or when
    what could train holds a number that is not finite.
    """

    token_ids_T: np.ndarray
    """int32 ``[T]``: prompt and response tokens."""
    loss_mask_T: np.ndarray
    """bool ``[T]``: True where a token was sampled by the policy and may train."""
    behavior_logprob_T: np.ndarray
    """float32 ``[T]``: log-prob (nats) under which the token was really sampled; 0 where the mask is False."""
    version_T: np.ndarray
    """int32 ``[T]``: learner step whose weights sampled the token; ``NO_VERSION`` where the mask is False."""
    outcome: Outcome
    reward: float | None
    """The verdict, or None where the outcome carries none."""
    response: str = ""
    """The decoded response, for people."""

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name)) for name in ("token_ids_T", "loss_mask_T", "behavior_logprob_T", "version_T")
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"per-token arrays of a trajectory must share one length, got {lengths}")
        if self.outcome.has_reward != (self.reward is not None):
            raise ValueError(f"outcome={self.outcome.value} contradicts reward={self.reward}")
        if self.reward is not None and not np.isfinite(self.reward):
            raise ValueError(f"reward={self.reward} is not finite; a verdict that is no number is outcome=no_verdict")
        if self.reward is not None and not np.isfinite(self.behavior_logprob_T).all():
            raise ValueError(
                f"outcome={self.outcome.value}, but a behaviour log-prob is not finite: no ratio can be formed with "
                "it; such a trajectory is outcome=error"
            )

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens."""
        return len(self.token_ids_T)

    @property
    def num_trained_tokens(self) -> int:
        """Tokens with a True loss mask."""
        return int(self.loss_mask_T.sum())

    @property
    def oldest_version(self) -> int:
        """Smallest version of its sampled tokens; ``NO_VERSION`` for an empty response."""
        return int(self.version_T[self.loss_mask_T].min()) if self.num_trained_tokens else NO_VERSION

    @property
    def newest_version(self) -> int:
        """Largest version of its sampled tokens; ``NO_VERSION`` for an empty response."""
        return int(self.version_T[self.loss_mask_T].max()) if self.num_trained_tokens else NO_VERSION


@dataclass(frozen=True, kw_only=True)
class TrajectoryGroup:
    """The n trajectories of one prompt: the unit of storage, sampling and credit."""

    key: str
    """The prompt's key, ``prompt_key(epoch, index)``."""
    prompt: str
    """The prompt's text, for people."""
    truth: Any
    """Ground truth of the prompt; a JSON value."""
    trajectories: tuple[Trajectory, ...]
    worker: str = ""
    """Name of the rollout worker that made it."""
    lease_version: int = 0
    """Version of the worker's weights when the prompt was leased: no token of the group is older."""

    def __post_init__(self) -> None:
        if not self.trajectories:
            raise ValueError(f"group {self.key} has no trajectories")

    @property
    def rewards_G(self) -> np.ndarray:
        """float64 ``[G]``: rewards, NaN where a trajectory has no verdict."""
        return np.array([np.nan if t.reward is None else t.reward for t in self.trajectories], dtype=np.float64)

    @property
    def num_scored(self) -> int:
        """Trajectories that carry a reward."""
        return sum(t.reward is not None for t in self.trajectories)

    @property
    def has_signal(self) -> bool:
        """True if at least two members have verdicts and these differ: otherwise every advantage is zero."""
        verdicts = [t.reward for t in self.trajectories if t.reward is not None]
        return len(verdicts) >= 2 and max(verdicts) > min(verdicts)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens of all members."""
        return sum(t.num_tokens for t in self.trajectories)

    @property
    def num_sampled_tokens(self) -> int:
        """Tokens of all members that the policy sampled."""
        return sum(t.num_trained_tokens for t in self.trajectories)

    @property
    def oldest_version(self) -> int:
        """Smallest version of any sampled token; the lease's version if no token was sampled."""
        versions = [t.oldest_version for t in self.trajectories if t.num_trained_tokens]
        return min(versions, default=self.lease_version)

    @property
    def newest_version(self) -> int:
        """Largest version of any sampled token; the lease's version if no token was sampled."""
        versions = [t.newest_version for t in self.trajectories if t.num_trained_tokens]
        return max(versions, default=self.lease_version)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to generate one prompt until a deadline. It ends in an append, or goes back."""

    key: str
    epoch: int
    index: int
    version: int
    """Version of the worker's weights at the time of the lease."""
    deadline_s: float
    """Unix time (seconds) at which the lease goes back to the ledger."""


@dataclass(frozen=True, kw_only=True)
class LeaseAnswer:
    """What the ledger says to a worker that asks for prompts."""

    leases: tuple[Lease, ...]
    reason: str
    """Empty when all that was asked for was granted; otherwise a sentence saying what the worker waits for."""
    exhausted: bool = False
    """True when the job needs no further prompt, ever."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """A stored group that was chosen for a learner step, without its payload."""

    group_id: int
    """The store's id of the group."""
    kind: Kind
    uses: int = 0
    """How often the group was consumed before this step."""
    weight: float = 1.0
    """Importance weight of the draw; see ``SampledGroup``."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which groups a learner step trains on, fresh first; their payloads come straight from the store's shards."""

    step: int
    """The learner step that consumes the batch; also the learner's version while it does."""
    draws: tuple[Draw, ...]

    @property
    def group_ids(self) -> tuple[int, ...]:
        """Store ids, in batch order."""
        return tuple(d.group_id for d in self.draws)

    def batch(self, groups: Mapping[int, TrajectoryGroup]) -> SampledBatch:
        """The plan with its payloads (id → group). ``KeyError`` if one is missing."""
        return SampledBatch(
            step=self.step,
            groups=tuple(
                SampledGroup(group_id=d.group_id, kind=d.kind, uses=d.uses, weight=d.weight, group=groups[d.group_id])
                for d in self.draws
            ),
        )


@dataclass(frozen=True, kw_only=True)
class SampledGroup:
    """A group drawn from the store for one learner step."""

    group_id: int
    """The store's id of the group."""
    kind: Kind
    uses: int
    """How often the group was consumed before this step."""
    group: TrajectoryGroup
    weight: float = 1.0
    """Importance weight of the draw: multiplies the group's share of the loss, so that its expectation does not depend
    on how stale groups are drawn. 1 for fresh groups and for uniform draws."""


@dataclass(frozen=True, kw_only=True)
class SampledBatch:
    """The groups of one learner step, fresh first."""

    step: int
    """The learner step that consumes the batch; also the learner's version while it does."""
    groups: tuple[SampledGroup, ...]

    @property
    def group_ids(self) -> tuple[int, ...]:
        """Store ids, in batch order."""
        return tuple(g.group_id for g in self.groups)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of a bucket. Names are those of the Hugging Face state dict."""

    name: str
    dtype: str
    """``float32``, ``bfloat16`` or ``float16``."""
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BucketSpec:
    """One bucket of weights; its payload is a safetensors file as bytes."""

    tensors: tuple[TensorSpec, ...]
    num_bytes: int
    """Length of the payload."""
    checksum: str
    """xxh3-128 of the payload, hexadecimal."""


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Fixed tokens and the learner's log-probs for them: the proof that an engine holds the right weights."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Entry i is the log-prob (nats, temperature 1) of token i + 1 given the tokens before it."""


Stamp = tuple[int, int]
"""Lineage and version of published weights; the greater one is the newer one."""


@dataclass(frozen=True, kw_only=True)
class WeightManifest:
    """What the learner published under one version."""

    version: int
    buckets: tuple[BucketSpec, ...]
    canary: Canary
    published_s: float = field(default=0.0)
    """Unix time (seconds) of the publication."""
    lineage: int = 0
    """How often the learner had gone back to a checkpoint before: the same version of two lineages is not the same."""

    @property
    def stamp(self) -> Stamp:
        """What tells these weights from all others of the run, and newer ones from older ones."""
        return self.lineage, self.version

    @property
    def num_bytes(self) -> int:
        """Payload bytes of all buckets."""
        return sum(b.num_bytes for b in self.buckets)


class PromptSource(Protocol):
    """Hands out prompts to generate, and takes them back."""

    async def lease(self, *, worker: str, stamp: Stamp, count: int, timeout_s: float) -> LeaseAnswer:
        """Up to ``count`` leases for a worker that holds the weights ``stamp``; waits at most ``timeout_s`` for one."""
        ...

    async def release(self, *, worker: str, keys: tuple[str, ...]) -> None:
        """Give prompts back that will not be answered by this worker."""
        ...


class GroupSink(Protocol):
    """Where finished groups go."""

    async def append(self, group: TrajectoryGroup) -> bool:
        """Return once the group is durable. True if it is new, False if its key was there already."""
        ...


class BatchSource(Protocol):
    """A batch whose payloads are fetched where they are needed."""

    def fetch(self) -> SampledBatch:
        """The batch with its payloads, from all shards in parallel."""
        ...


class GroupSource(Protocol):
    """Where the learner's batches come from."""

    async def sample(self, *, step: int, timeout_s: float) -> BatchPlan | None:
        """The batch of ``step``, or None if it is not complete within ``timeout_s``. Repeatable until committed."""
        ...

    async def commit(self, *, step: int, group_ids: tuple[int, ...]) -> None:
        """Record the groups as consumed by ``step``; the learner's version becomes ``step + 1``."""
        ...


Buckets = Iterable[tuple[BucketSpec, memoryview] | None]
"""All buckets of the learner's weights in order, gathered while they are iterated, by all ranks together; None on ranks
other than 0. The bytes of a bucket are there until the next one is asked for."""


class WeightSender(Protocol):
    """How the learner's weights leave it: one weight transport, as a rank sees it."""

    def open(self, *, rank: int, address: tuple[str, int]) -> None:
        """Called once by every rank; ``address`` names its machine and a free port there."""
        ...

    def put(self, payload: memoryview) -> Any:
        """Keep a copy of a bucket before its version is announced; returns a reference, or None if nothing is kept."""
        ...

    def send(self, buckets: Buckets, specs: Sequence[BucketSpec]) -> None:
        """Called by every rank once a version is announced of which nothing was kept; ``specs`` are rank 0's."""
        ...


class WeightSource(Protocol):
    """Where rollout workers find the learner's newest weights."""

    async def newest(self, *, after: Stamp, timeout_s: float) -> WeightManifest | None:
        """The newest manifest if its stamp is above ``after``, or None if there is none within ``timeout_s``."""
        ...

    async def fetch(self, manifest: WeightManifest) -> tuple[memoryview, ...]:
        """The payloads of the manifest's buckets, in order. ``LookupError`` if they have been superseded."""
        ...


@dataclass(frozen=True, kw_only=True)
class SyncRecord:
    """One weight sync of one rollout worker."""

    worker: str
    version: int
    fetch_s: float
    """Seconds to fetch and verify the buckets, while generation went on."""
    pause_s: float
    """Seconds during which generation stood still."""
    canary_gap: float
    """Largest absolute difference (nats) between the engine's and the learner's log-probs on the canary."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Mean reward on held-out prompts under one version."""

    version: int
    accuracy: float
    """Mean reward of one sample per prompt at the training temperature."""
    greedy_accuracy: float
    """Mean reward of the greedy response."""
    num_prompts: int
    """Prompts whose sampled response got a verdict."""
    sets: Mapping[str, Evaluation] = field(default_factory=dict)
    """The same on further held-out sets, by name."""


@dataclass(frozen=True, kw_only=True)
class RolloutStats:
    """What one rollout worker did since it started."""

    worker: str
    version: int
    """Version of the engine's weights; ``NO_VERSION`` before the first verified sync."""
    groups: int
    trajectories: int
    tokens: int
    """Sampled tokens."""
    busy_s: float
    """Seconds with at least one group in flight."""
    alive_s: float
    """Seconds since the worker's first verified sync."""
    in_flight: int
    waits_for: str
    """A sentence saying what the worker waits for; empty while it generates at capacity."""
    new_syncs: tuple[SyncRecord, ...]
    """Weight syncs since the worker was last asked."""
