from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from r2vpo.job.plan_batch import Batch
from r2vpo.job.plan_memory import engine_memory, layer_elements, learner_memory, mask_bytes
from r2vpo.job.plan_model import ModelShape

MODEL = ModelShape(
    architecture="Qwen2ForCausalLM",
    num_parameters=1_000_000,
    layers=2,
    hidden=8,
    intermediate=32,
    query=8,
    key_value=4,
    vocabulary=100,
    dtype="float32",
)
BATCH = Batch(
    fresh=1,
    stale=0,
    trajectories=2,
    tokens=32,
    minibatches=1,
    passes=1,
    minibatch_groups=1,
    micro_batches=1,
    row_tokens=16,
)


def learner(*, dtype="bfloat16", stage=0, ranks=4, checkpointing=False, flash=True, on_gpu=True):
    return learner_memory(
        MODEL,
        BATCH,
        dtype=dtype,
        stage=stage,
        ranks=ranks,
        checkpointing=checkpointing,
        flash=flash,
        on_gpu=on_gpu,
    )


@pytest.mark.parametrize(
    ("dtype", "stage", "megabytes"),
    [
        ("float32", 0, (4, 4, 8)),
        ("bfloat16", 0, (2, 4, 3)),  # runs as stage 1
        ("bfloat16", 1, (2, 4, 3)),
        ("bfloat16", 2, (2, 1, 3)),
        ("bfloat16", 3, (0.5, 1, 3)),
        ("float32", 2, (4, 1, 3)),
    ],
)
def test_a_million_parameters_on_four_ranks_by_zero_stage(dtype, stage, megabytes):
    memory = learner(dtype=dtype, stage=stage)
    assert (memory.weights, memory.gradients, memory.optimizer) == tuple(1e6 * size for size in megabytes)


def test_a_gpu_gives_the_whole_buffer_away_and_main_memory_only_what_is_written():
    assert learner(stage=2).buffers == 2 * 500_000_000
    assert learner(stage=2, on_gpu=False).buffers == 2 * 1_000_000
    assert learner(dtype="float32", stage=0, ranks=1).buffers == 0


def test_activations_with_and_without_gradient_checkpointing():
    # a layer keeps per token 6·8 + 2·8 + 2·4 + 4·32 = 200 numbers, or 8 more for every query head's keys and values
    assert layer_elements(MODEL, item=4, flash=True) == 200
    assert layer_elements(MODEL, item=4, flash=False) == 208
    # 16 tokens × 2 layers × 200 × 4 bytes; with checkpointing 2 inputs of 8 and one layer
    assert learner(dtype="float32").activations == 16 * 2 * 200 * 4
    assert learner(dtype="float32", checkpointing=True).activations == 16 * (2 * 8 + 200) * 4
    # and 16 × 16 masks of every layer
    assert learner(dtype="float32", flash=False).activations == 16 * 2 * 208 * 4 + 2 * 16 * 16 * 4


def test_logits_count_twice_and_their_chunks_three_times():
    # 16 × 100 = 1600 numbers: logits and their gradient in 2 bytes, three chunks in 4
    assert learner().logits == 1600 * (2 * 2 + 3 * 4)


def test_total_is_the_sum_of_its_parts():
    memory = learner(dtype="float32", ranks=1)
    assert memory.total == 16e6 + memory.activations + memory.logits


def test_an_engine_holds_weights_one_bucket_and_its_cache():
    engine = engine_memory(MODEL, dtype="bfloat16", kv_cache_bytes=3200, bucket_bytes=500_000, gpus=1)
    assert engine.weights == 2e6
    assert engine.reload == 500_000
    assert engine.kv_token_bytes == 2 * 2 * 4 * 2  # keys and values, 2 layers, width 4, 2 bytes
    assert engine.kv_tokens == 100
    assert engine.total == 2e6 + 500_000 + 3200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_what_torch_keeps_for_the_backward_pass(dtype):
    """Two and four layers of a real model on four packed sequences: what two more layers keep, counted by torch."""
    model = replace(MODEL, hidden=64, intermediate=160, query=64, key_value=32)
    batch = replace(BATCH, row_tokens=256)
    kept = (kept_bytes(4, batch.row_tokens, dtype) - kept_bytes(2, batch.row_tokens, dtype)) / 2
    item = dtype.itemsize
    estimate = item * batch.row_tokens * layer_elements(model, item=item, flash=False)
    estimate += mask_bytes(replace(model, layers=1), batch, item=item, checkpointing=False, flash=False)
    assert kept == pytest.approx(estimate, rel=0.05)


def kept_bytes(layers: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that a forward pass keeps beside the parameters."""
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in parameters:
            kept[address] = tensor
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    positions = torch.arange(tokens // 4).repeat(4)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=torch.arange(1))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
