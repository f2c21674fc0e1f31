"""One vLLM engine, seen as the few verbs that a rollout worker needs. With `weight_transfer.py` the only vLLM import.

The environment of `environment.py` must be in place before this module is imported.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NoReturn

import numpy as np
from vllm import SamplingParams
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from rollout.config import RolloutConfig
from rollout.generation import Completion, EngineFailed
from rollout.weight_transfer import BACKENDS

GIB = 1 << 30
MIN_BATCHED_TOKENS = 2048
"""Tokens that an engine on the CPU may compute at once, if its window is not larger."""
WATCH_S = 0.5
"""Between two looks at the engine's processes (seconds)."""


class RolloutEngine:
    """An ``AsyncLLM`` with versioned weights. Create with ``await RolloutEngine.start(…)``."""

    def __init__(self, llm: AsyncLLM, config: RolloutConfig) -> None:
        self._llm = llm
        self._config = config
        self._num_requests = 0

    @classmethod
    async def start(
        cls, config: RolloutConfig, *, model_path: str, on_gpu: bool, trust_remote_code: bool, transport: str
    ) -> RolloutEngine:
        """Load the model from ``model_path`` as version 0 and start the engine's processes.

        With ``transport="nccl"``, ``connect`` comes before the first ``load``.
        """
        arguments = AsyncEngineArgs(
            model=model_path,
            trust_remote_code=trust_remote_code,
            load_format="safetensors",  # `auto` would take pickled weights where there are no others
            dtype=config.dtype if on_gpu or config.dtype != "auto" else "float32",  # type: ignore[arg-type]
            max_model_len=config.max_model_len,
            max_num_seqs=config.group_size * config.groups_in_flight + 1,  # room for a probe
            tensor_parallel_size=config.tensor_parallel_size,
            kv_cache_memory_bytes=None if config.kv_cache_gb is None else int(config.kv_cache_gb * GIB),
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=config.enforce_eager or not on_gpu,
            enable_prefix_caching=config.prefix_caching,
            **({} if on_gpu else _cpu_scheduling(config)),
            # What the tokens were drawn from, temperature included: the behaviour distribution itself.
            logprobs_mode="processed_logprobs",
            # A model's own generation_config may carry top-p or top-k, which would bias the ratio.
            generation_config="vllm",
            weight_transfer_config=WeightTransferConfig(backend=BACKENDS[transport]),
            disable_log_stats=True,
        )
        llm = AsyncLLM.from_engine_args(arguments)
        engine = cls(llm, config)
        if transport == "object_store":
            await engine.connect({})
        await llm.update_weight_version("0")
        return engine

    async def generate(
        self, prompt_token_ids: Sequence[int], *, n: int, seed: int | None, temperature: float, max_tokens: int
    ) -> list[Completion]:
        """``n`` responses to one prompt, in member order; member i is seeded with ``seed + i``.

        Raises ``EngineFailed`` if the engine died, ``ValueError`` if the prompt does not fit the model's window.
        """
        parameters = SamplingParams(
            n=n,
            seed=seed,
            temperature=temperature,
            max_tokens=max_tokens,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output = await self._final_output(prompt_token_ids, parameters)
        return [_completion(c) for c in sorted(output.outputs, key=lambda c: c.index)]

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 ``[T - 1]``: log-prob (nats, temperature 1) of every token after the first, given those before it."""
        parameters = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY
        )
        output = await self._final_output(token_ids, parameters)
        assert output.prompt_logprobs is not None
        scores = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return np.array([entry[token].logprob for entry, token in scores if entry is not None], dtype=np.float32)

    async def connect(self, init_info: Mapping[str, Any]) -> None:
        """Meet the other side of a transport that needs it; returns once all are there."""
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=dict(init_info)))

    async def load(self, updates: Sequence[Mapping[str, Any]], *, version: int) -> None:
        """Apply the updates of a ``Delivery`` and label the weights ``version``. Call it inside ``paused()``."""
        with _clear_errors("loaded weights"):
            await self._llm.start_weight_update()
            for update in updates:
                await self._llm.update_weights(WeightTransferUpdateRequest(update_info=dict(update)))
            await self._llm.finish_weight_update(weight_version=str(version))

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Hold all requests, those in flight included, and let them continue afterwards.

        Clearing the cache makes requests in flight recompute their keys and values under the new weights: no cache
        entry outlives its version, and every later token is sampled from exactly the policy that its version names.
        """
        with _clear_errors("was paused"):
            await self._llm.pause_generation(mode="keep", clear_cache=True)
            try:
                yield
            finally:
                await self._llm.resume_generation()

    async def watch(self) -> NoReturn:
        """Look at the engine's processes until they are dead: ``EngineFailed``.

        Without it a death could go unnoticed: a request in flight hears of it, but a call to vLLM's core waits forever.
        """
        while not self._llm.errored:
            await asyncio.sleep(WATCH_S)
        raise EngineFailed("vLLM's engine died")

    async def probe(self, timeout_s: float) -> float:
        """Generate one token and return the seconds it took; a health endpoint is no proof of life.

        ``EngineFailed`` if it takes more than ``timeout_s`` seconds.
        """
        started_s = time.monotonic()
        parameters = SamplingParams(max_tokens=1, temperature=0.0, output_kind=RequestOutputKind.FINAL_ONLY)
        try:
            async with asyncio.timeout(timeout_s):
                await self._final_output([0], parameters)
        except TimeoutError:
            raise EngineFailed(f"vLLM's engine has not generated a token for {timeout_s:g} s") from None
        return time.monotonic() - started_s

    def shutdown(self) -> None:
        """End the engine's processes."""
        self._llm.shutdown()

    async def _final_output(self, token_ids: Sequence[int], parameters: SamplingParams) -> RequestOutput:
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        final: RequestOutput | None = None
        prompt = {"prompt_token_ids": [int(t) for t in token_ids]}
        with _clear_errors("generated"):
            async for output in self._llm.generate(prompt, parameters, request_id=request_id):  # type: ignore[arg-type]
                final = output
        assert final is not None, "vLLM ended a request without an output"
        return final


def _cpu_scheduling(config: RolloutConfig) -> dict[str, Any]:
    """vLLM on CPU cannot go on with a seeded request whose prompt it has computed in parts: compute prompts whole."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(MIN_BATCHED_TOKENS, config.max_model_len),
    }


@contextmanager
def _clear_errors(doing: str) -> Iterator[None]:
    """``EngineFailed`` where vLLM only refers to what it logged, ``ValueError`` for a request that it refuses."""
    try:
        yield
    except VLLMClientError as error:
        raise ValueError(str(error)) from error
    except (EngineDeadError, EngineGenerateError) as error:
        raise EngineFailed(f"vLLM's engine died while it {doing}") from error


def _completion(output: CompletionOutput) -> Completion:
    assert output.logprobs is not None, "log-probs were asked for"
    assert output.weight_versions is not None, "only final outputs are read"
    token_ids = list(output.token_ids)
    version_T = np.empty(len(token_ids), dtype=np.int32)
    covered = 0
    for span in output.weight_versions:
        version_T[span.start : span.end] = int(span.version)
        covered += span.end - span.start
    if covered != len(token_ids):
        raise EngineFailed(f"vLLM reported versions for {covered} of {len(token_ids)} tokens")
    entries = zip(output.logprobs, token_ids, strict=True)
    logprobs = [entry[token].logprob for entry, token in entries if entry is not None]
    return Completion(
        text=output.text,
        token_ids_T=np.array(token_ids, dtype=np.int32),
        logprob_T=np.array(logprobs, dtype=np.float32),
        version_T=version_T,
        truncated=output.finish_reason == "length",
    )
