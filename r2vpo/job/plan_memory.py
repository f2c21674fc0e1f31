"""Memory that a learner rank and an engine take, part by part, from the model's shape and the settings.

State of the learner: ZeRO (arXiv 1910.02054), section 3 and figure 1. There a parameter takes 2 bytes of weights, 2 of
gradients and 12 of optimiser (float32 master weights and two moments), and stages 1, 2, 3 divide the optimiser, then
the gradients, then the weights by the number of ranks. Gradients take 4 bytes here, since `learner/engine.py` has
DeepSpeed accumulate them in float32. In float32 without ZeRO it is 4 + 4 + 8: there are no master weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo.job.plan_batch import Batch
from r2vpo.job.plan_model import ITEM_BYTES, ModelShape

REDUCE_ELEMENTS = 500_000_000
"""DeepSpeed's buffer through which gradients travel (`zero_optimization.reduce_bucket_size`, its default)."""
LIVE_ELEMENTS = 1_000_000_000
"""Most parameters that ZeRO-3 keeps gathered (`stage3_max_live_parameters`, its default)."""
CHUNK_ELEMENTS = 2**25
"""float32 values of one chunk of log-probs; see `learner.logprobs`. Three of its size live at once."""


@dataclass(frozen=True, kw_only=True)
class LearnerMemory:
    """Bytes on the device of one learner rank (its GPU, or main memory)."""

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    """Gradients on their way between ranks, and under ZeRO-3 the layers that are gathered."""
    activations: float
    logits: float
    """Of one forward pass, their gradient, and the chunks in which log-probs are computed."""
    mask_bytes: float = 0.0
    """Part of ``activations`` that keeps packed trajectories apart, and grows with the square of the row."""

    @property
    def total(self) -> float:
        """At the top of a backward pass."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations + self.logits


@dataclass(frozen=True, kw_only=True)
class EngineMemory:
    """Bytes on the device of one engine; on several GPUs, of each of them."""

    weights: float
    reload: float
    """New weights beside the old ones, while a version is loaded."""
    kv_cache: float | None
    """None where that of the GPU is not known."""
    kv_token_bytes: float
    """Keys and values of one token."""

    @property
    def total(self) -> float | None:
        """While a version is loaded."""
        return None if self.kv_cache is None else self.weights + self.reload + self.kv_cache

    @property
    def kv_tokens(self) -> int | None:
        """Tokens that the cache holds."""
        return None if self.kv_cache is None else int(self.kv_cache / self.kv_token_bytes)


def learner_memory(
    model: ModelShape,
    batch: Batch,
    *,
    dtype: str,
    stage: int,
    ranks: int,
    checkpointing: bool,
    flash: bool,
    on_gpu: bool,
) -> LearnerMemory:
    """``stage`` as configured; bfloat16 with stage 0 runs as stage 1, as in `learner.engine`."""
    item, num = ITEM_BYTES[dtype], model.num_parameters
    stage = 1 if stage == 0 and dtype == "bfloat16" else stage
    mask = mask_bytes(model, batch, item=item, checkpointing=checkpointing, flash=flash)
    return LearnerMemory(
        weights=item * num / (ranks if stage == 3 else 1),
        gradients=4 * num / (ranks if stage >= 2 else 1),
        optimizer=(8 * num if stage == 0 else 12 * num / ranks),
        buffers=_buffers(num, item=item, stage=stage, ranks=ranks, on_gpu=on_gpu),
        activations=_activations(model, batch, item=item, checkpointing=checkpointing, flash=flash) + mask,
        logits=_logits(model, batch, item=item),
        mask_bytes=mask,
    )


def engine_memory(
    model: ModelShape, *, dtype: str, kv_cache_bytes: float | None, bucket_bytes: float, gpus: int
) -> EngineMemory:
    """``gpus`` of one engine, 1 on the CPU. A version is loaded bucket by bucket, beside what is there."""
    item = ITEM_BYTES[dtype]
    weights = item * model.num_parameters / gpus
    return EngineMemory(
        weights=weights,
        reload=min(item * model.num_parameters, bucket_bytes),
        kv_cache=kv_cache_bytes,
        kv_token_bytes=2 * model.layers * model.key_value * item / gpus,
    )


def layer_elements(model: ModelShape, *, item: int, flash: bool) -> int:
    """Numbers that one layer keeps per token for its backward pass, the mask aside.

    Two norms (input, normalised, scaled: 3 · hidden each, and one more where the norm computes in float32 on 2-byte
    weights, which counts double), queries, output of the attention, keys and values (repeated for every query head
    where a mask is given), and four of the feed-forward layer: gate, its activation, up, their product.
    """
    norms = (6 if item == 4 else 8) * model.hidden
    attention = 2 * model.query + 2 * (model.key_value if flash else model.query)
    return norms + attention + 4 * model.intermediate


def mask_bytes(model: ModelShape, batch: Batch, *, item: int, checkpointing: bool, flash: bool) -> float:
    """The mask ``[T, T]`` that every layer keeps where packed trajectories are not kept apart by flash attention."""
    return 0.0 if flash else item * batch.row_tokens**2 * (1 if checkpointing else model.layers)


def _activations(model: ModelShape, batch: Batch, *, item: int, checkpointing: bool, flash: bool) -> float:
    """All layers', or with gradient checkpointing every layer's input and one layer's all."""
    per_token = layer_elements(model, item=item, flash=flash)
    if checkpointing:
        return item * batch.row_tokens * (model.layers * model.hidden + per_token)
    return item * batch.row_tokens * model.layers * per_token


def _logits(model: ModelShape, batch: Batch, *, item: int) -> float:
    elements = batch.row_tokens * model.vocabulary
    return 2 * item * elements + 3 * 4 * min(elements, max(CHUNK_ELEMENTS, model.vocabulary))


def _buffers(num: int, *, item: int, stage: int, ranks: int, on_gpu: bool) -> float:
    # A GPU gives the whole buffer away at once; of main memory only what is written to counts.
    reduce = REDUCE_ELEMENTS if on_gpu else min(num, REDUCE_ELEMENTS)
    if stage == 0:
        return 0.0 if ranks == 1 else item * min(num, REDUCE_ELEMENTS)
    if stage == 3:
        return item * (reduce + min(num, LIVE_ELEMENTS))
    # Stage 1 sends its float32 sums, stage 2 what comes out of the backward pass.
    return (4 if stage == 1 else item) * reduce
