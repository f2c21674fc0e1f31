import numpy as np
import pytest
import torch
from safetensors.torch import load

from learner.config import LearnerConfig
from learner.publish import CANARY_LENGTH, BucketEncoder, bucket_names, canary_tokens, random_tokens
from r2vpo.checksum import checksum, verify_bucket
from r2vpo.records import TensorSpec


def spec(name, *shape, dtype="float32"):
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def test_tensors_share_a_bucket_up_to_its_size_and_a_larger_one_has_its_own():
    # 1 MiB is 262,144 float32: a and b fill one exactly, c alone exceeds it, d in bfloat16 takes half.
    tensors = [
        spec("a", 256, 512),
        spec("b", 256, 512),
        spec("c", 1024, 512),
        spec("d", 512, 512, dtype="bfloat16"),
        spec("e", 1),
    ]
    assert bucket_names(tensors, bucket_mb=1.0) == [["a", "b"], ["c"], ["d", "e"]]


def test_a_bucket_survives_the_journey_bit_for_bit():
    tensors = {
        "w": torch.randn(3, 4).T,
        "b": torch.randn(5).bfloat16(),
        "flag": torch.tensor([True]),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "count": torch.tensor([2**40]),
    }
    description, payload = BucketEncoder().encode(tensors)
    verify_bucket(payload, description)
    decoded = load(bytes(payload))
    assert all(torch.equal(decoded[name], tensor) for name, tensor in tensors.items())
    assert description.num_bytes == len(payload)
    assert description.tensors == (
        spec("w", 4, 3),
        spec("b", 5, dtype="bfloat16"),
        spec("flag", 1, dtype="bool"),
        spec("scalar"),
        spec("none", 0, 3),
        spec("count", 1, dtype="int64"),
    )


def test_every_bucket_takes_the_memory_of_the_one_before():
    encoder = BucketEncoder()
    _, large = encoder.encode({"w": torch.ones(256)})
    address = np.frombuffer(large, np.uint8).ctypes.data
    description, small = encoder.encode({"w": torch.zeros(64)})
    assert np.frombuffer(small, np.uint8).ctypes.data == address
    assert len(small) == description.num_bytes < len(large)
    assert torch.equal(load(bytes(small))["w"], torch.zeros(64))


def test_a_flipped_bit_and_a_missing_byte_are_noticed():
    description, payload = BucketEncoder().encode({"w": torch.zeros(4)})
    flipped = bytearray(payload)
    flipped[-1] ^= 1
    with pytest.raises(ValueError, match="the bucket that starts with w has checksum"):
        verify_bucket(bytes(flipped), description)
    with pytest.raises(ValueError, match=rf"has {len(payload) - 1} bytes, its manifest says {len(payload)}"):
        verify_bucket(payload[:-1], description)


def test_the_checksum_is_xxh3_128():
    assert checksum(b"") == "99aa06d3014798d86001c324468d497f"  # the algorithm's published value of no bytes


def test_the_canary_is_the_same_every_time_and_has_no_special_token():
    tokens = canary_tokens([], vocab_size=14, special_ids={12, 13})
    assert tokens.tolist() == random_tokens(vocab_size=14, special_ids={12, 13}).tolist()
    assert len(tokens) == CANARY_LENGTH
    assert set(tokens.tolist()) <= set(range(12))
    assert len(set(tokens.tolist())) > 5


def test_the_canary_of_a_task_is_its_prompt():
    assert canary_tokens([1, 2, 10, 3, 11], vocab_size=14, special_ids={12, 13}).tolist() == [1, 2, 10, 3, 11]
    assert canary_tokens([1] * 100, vocab_size=14, special_ids={12, 13}).tolist() == [1] * CANARY_LENGTH


def test_weights_are_published_every_so_many_steps_and_after_the_last():
    config = LearnerConfig(sync_every=3, steps=8)
    assert [version for version in range(9) if config.publishes(version)] == [0, 3, 6, 8]
