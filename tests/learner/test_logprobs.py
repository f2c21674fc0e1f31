import math

import pytest
import torch

from learner.logprobs import token_logprobs


def test_two_equal_logits_have_log_probs_and_entropy_of_a_coin():
    logp_N, entropy_N = token_logprobs(torch.tensor([[1.0, 1.0]]), torch.tensor([0]), 1.0)
    assert logp_N.item() == pytest.approx(math.log(0.5))
    assert entropy_N.item() == pytest.approx(math.log(2))


def test_the_temperature_divides_the_logits():
    # softmax([0, 2·ln 3] / 2) = [1/4, 3/4]
    logp_N, _ = token_logprobs(torch.tensor([[0.0, 2 * math.log(3)]]), torch.tensor([1]), 2.0)
    assert logp_N.exp().item() == pytest.approx(0.75)


@pytest.mark.parametrize("chunk_elements", [1, 20, 1000])
def test_chunks_change_neither_values_nor_gradients(chunk_elements):
    torch.manual_seed(0)
    logits = torch.randn(11, 7, requires_grad=True)
    target, upstream = torch.randint(0, 7, (11,)), torch.randn(11)
    logp_N, entropy_N = token_logprobs(logits, target, 0.7, chunk_elements=chunk_elements)
    expected = torch.log_softmax(logits / 0.7, -1)
    (gradient,) = torch.autograd.grad((expected.gather(1, target[:, None])[:, 0] * upstream).sum(), logits)
    (found,) = torch.autograd.grad((logp_N * upstream).sum(), logits)
    torch.testing.assert_close(logp_N, expected.gather(1, target[:, None])[:, 0])
    torch.testing.assert_close(entropy_N, -(expected.exp() * expected).sum(-1))
    torch.testing.assert_close(found, gradient)


def test_the_gradient_equals_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 5, (4,))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, target, 0.7, chunk_elements=10)[0], (logits,))


def test_bfloat16_logits_are_normalised_in_float32():
    logits = torch.randn(3, 50).bfloat16().requires_grad_()
    logp_N, _ = token_logprobs(logits, torch.tensor([0, 1, 2]), 1.0)
    assert logp_N.dtype == torch.float32
    torch.testing.assert_close(logp_N, torch.log_softmax(logits.float(), -1).diagonal()[:3])
    logp_N.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_no_token_at_all_still_gives_a_gradient_of_zero():
    weight = torch.ones(4, 6, requires_grad=True)
    logp_N, _ = token_logprobs(torch.zeros(0, 4) @ weight, torch.zeros(0, dtype=torch.int64), 1.0)
    (-logp_N.sum() / 5).backward()
    assert weight.grad.abs().max() == 0


def test_large_logits_do_not_overflow():
    logp_N, entropy_N = token_logprobs(torch.tensor([[1e4, 0.0]]), torch.tensor([1]), 1.0)
    assert logp_N.item() == -1e4
    assert entropy_N.item() == 0
