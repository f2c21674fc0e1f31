"""What a worker asks of an engine, and what it gets back: the seam between worker and vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import numpy as np
import xxhash


class EngineFailed(RuntimeError):  # noqa: N818 - says what happened
    """The engine or one of its processes is dead; its worker is of no use any more."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sampled response. All arrays share the axis of response tokens."""

    text: str
    token_ids_T: np.ndarray
    """int32 ``[T]``."""
    logprob_T: np.ndarray
    """float32 ``[T]``: log-prob (nats) of each token in the distribution it was drawn from, temperature included."""
    version_T: np.ndarray
    """int32 ``[T]``: version of the weights that sampled each token."""
    truncated: bool
    """True if the response was cut at ``max_tokens``."""

    @property
    def is_finite(self) -> bool:
        """Whether all log-probs are finite numbers; an engine whose numbers overflow reports others."""
        return bool(np.isfinite(self.logprob_T).all())


class Engine(Protocol):
    """A language model that generates, with versioned weights. ``rollout.engine.RolloutEngine`` is the real one."""

    async def generate(
        self, prompt_token_ids: Sequence[int], *, n: int, seed: int | None, temperature: float, max_tokens: int
    ) -> Sequence[Completion]:
        """``n`` responses in member order. ``ValueError`` if the prompt does not fit, ``EngineFailed`` if it died."""
        ...

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 ``[T - 1]``: log-prob (nats, temperature 1) of every token after the first."""
        ...

    async def load(self, updates: Sequence[Mapping[str, Any]], *, version: int) -> None:
        """Apply the updates of a ``Delivery`` and label the weights ``version``; only inside ``paused()``."""
        ...

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Hold all requests, and let them continue afterwards."""
        ...

    async def watch(self) -> NoReturn:
        """Look at the engine's processes until they are dead: ``EngineFailed``."""
        ...

    async def probe(self, timeout_s: float) -> float:
        """Generate one token; the seconds it took. ``EngineFailed`` if it takes more than ``timeout_s``."""
        ...


def request_seed(run_seed: int, key: str) -> int:
    """The seed of a prompt's first member; member i is sampled with this plus i.

    A hash spreads the prompts over 62 bits: seeds counted up from prompt to prompt would hand the same random numbers
    to neighbouring groups.
    """
    return xxhash.xxh3_64_intdigest(f"{run_seed}/{key}".encode()) >> 2
