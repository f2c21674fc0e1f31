"""Log-probs of chosen tokens, without a float32 copy of the whole ``[N, vocabulary]`` matrix.

With 4,096 tokens and a vocabulary of 150,000, log-softmax in float32 would hold 2.5 GB for its output and as much again
for its gradient. Here both directions work on a few rows at a time; only one number per token is kept between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**25
"""float32 values (128 MiB) that one chunk of rows may hold."""


def token_logprobs(
    logits_NV: Tensor, target_N: Tensor, temperature: float, *, chunk_elements: int = _CHUNK_ELEMENTS
) -> tuple[Tensor, Tensor]:
    """Log-probs ``[N]`` (nats) of tokens ``target_N`` and the entropy ``[N]`` of their distributions.

    The distribution of row n is ``softmax(logits_NV[n] / temperature)``, computed in float32 (in float64 for float64
    logits). Only the log-probs carry a gradient; the entropy is a measurement.
    """
    chunk = max(1, chunk_elements // logits_NV.shape[1])
    return _TokenLogprobs.apply(logits_NV, target_N, temperature, chunk)


class _TokenLogprobs(torch.autograd.Function):
    """logp = x[target] - logsumexp(x) with x = logits / temperature; d logp / d x = onehot(target) - softmax(x)."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, target_N: Tensor, temperature: float, chunk: int) -> tuple[Tensor, Tensor]:
        normaliser_N = logits_NV.new_empty(len(logits_NV), dtype=_wide(logits_NV))
        logp_N, entropy_N = torch.empty_like(normaliser_N), torch.empty_like(normaliser_N)
        for start in range(0, len(logits_NV), chunk):
            rows = slice(start, start + chunk)
            scaled = logits_NV[rows].to(_wide(logits_NV)) / temperature
            normaliser = scaled.logsumexp(-1)
            normaliser_N[rows] = normaliser
            logp_N[rows] = scaled.gather(1, target_N[rows, None])[:, 0] - normaliser
            entropy_N[rows] = normaliser - (scaled.softmax(-1) * scaled).sum(-1)
        ctx.save_for_backward(logits_NV, target_N, normaliser_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, target_N, normaliser_N = ctx.saved_tensors
        scaled_grad_N = grads[0] / ctx.temperature
        grad_NV = torch.empty_like(logits_NV)
        for start in range(0, len(logits_NV), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            scaled = logits_NV[rows].to(_wide(logits_NV)) / ctx.temperature
            row_grad = scaled_grad_N[rows, None]
            weights = (scaled - normaliser_N[rows, None]).exp() * -row_grad
            grad_NV[rows] = weights.scatter_add_(1, target_N[rows, None], row_grad)
        return grad_NV, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
