"""A small decoder that reads one prompt and all its answers in one sequence.

    positions   0 … P-1            P            P+1       …
    tokens      prompt             answers[:,0] answers[:,1]     each slot holds the n members' tokens side by side
    sees        what is before it  the prompt, and what its own member said before

The prompt is computed once for all members, and an answer's tokens see only their own member (a mask). Sampling is the
same pass in pieces, one slot at a time with the keys and values of the slots before it, so its log-probs are those of
the full pass up to rounding.

Axes: ``_B`` prompts, ``_P`` prompt tokens, ``_n`` members, ``_T`` answer tokens, ``_L`` = P + (T-1)·n positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTHS = {"0.1M": 64, "0.4M": 128, "1.6M": 256}
"""Width of the residual stream by size in parameters, with two layers."""
_LAYERS = 2
_HEADS = 4

KeysValues = tuple[Tensor, Tensor]
"""Of one layer, each ``[B, heads, L, width / heads]``."""


class Block(nn.Module):
    """Attention and a feed-forward layer with squared ReLU, both behind an RMSNorm; no dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor, past: KeysValues | None) -> tuple[Tensor, KeysValues]:
        """``x`` is ``[B, L, width]``; ``mask`` (0 or -inf) is ``[L, past + L]``; returns x, keys and values."""
        batch, length, width = x.shape
        qkv = self.qkv(_norm(x, self.attention_norm)).view(batch, length, 3, _HEADS, width // _HEADS)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.relu(self.up(_norm(x, self.feed_norm))).square()), (k, v)


class Decoder(nn.Module):
    """A causal language model over answers of one fixed length to prompts of one fixed length."""

    def __init__(self, *, size: str, vocabulary: int, prompt_tokens: int, answer_tokens: int, seed: int) -> None:
        super().__init__()
        width = WIDTHS[size]
        self.prompt_tokens, self.answer_tokens = prompt_tokens, answer_tokens
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(prompt_tokens + answer_tokens - 1, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(_LAYERS)])
        self.norm = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = 0.5 if "embedding" in name or "position" in name else parameter.shape[1] ** -0.5
                std = 0.0 if name.endswith(("out.weight", "down.weight", "head.weight")) else std
                nn.init.normal_(parameter, std=std, generator=generator)

    def logits(self, prompt_BP: Tensor, answer_BnT: Tensor) -> Tensor:
        """Logits of every answer token, ``[B, n, T, vocabulary]``."""
        batch, members, answer_tokens = answer_BnT.shape
        packed_BL = torch.cat([prompt_BP, answer_BnT[:, :, :-1].transpose(1, 2).reshape(batch, -1)], dim=1)
        layout = Layout(self.prompt_tokens, members, answer_tokens, self.norm.dtype)
        hidden, _ = self.hidden(packed_BL, layout, slice(0, packed_BL.shape[1]), None)
        first = hidden[:, self.prompt_tokens - 1, None, None].expand(-1, members, -1, -1)
        rest = hidden[:, self.prompt_tokens :].view(batch, answer_tokens - 1, members, -1).transpose(1, 2)
        return self.head(torch.cat([first, rest], dim=2))

    def logp(self, prompt_BP: Tensor, answer_BnT: Tensor) -> Tensor:
        """Log-probs (nats) of every answer token, ``[B, n, T]``."""
        logp = torch.log_softmax(self.logits(prompt_BP, answer_BnT), dim=-1)
        return logp.gather(-1, answer_BnT[..., None])[..., 0]

    def hidden(
        self, tokens: Tensor, layout: Layout, part: slice, past: list[KeysValues] | None
    ) -> tuple[Tensor, list[KeysValues]]:
        """Normed residual stream of the positions of ``part``, and all keys and values up to its end."""
        x = self.embedding(tokens) + self.position(layout.position_L[part])
        mask, caches = layout.mask_LL[part, : part.stop], []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, mask, None if past is None else past[i])
            caches.append(cache)
        return _norm(x, self.norm), caches


class Layout:
    """Which position of the packed sequence stands where, and sees which."""

    def __init__(self, prompt_tokens: int, members: int, answer_tokens: int, dtype: torch.dtype) -> None:
        slot = torch.arange(answer_tokens - 1).repeat_interleave(members)
        self.position_L = torch.cat([torch.arange(prompt_tokens), prompt_tokens + slot])
        member_L = torch.cat([torch.full((prompt_tokens,), -1), torch.arange(members).repeat(answer_tokens - 1)])
        same = (member_L[None, :] == -1) | (member_L[None, :] == member_L[:, None])
        sees_LL = same & (self.position_L[None, :] <= self.position_L[:, None])
        self.mask_LL = torch.zeros(sees_LL.shape, dtype=dtype).masked_fill(~sees_LL, float("-inf"))


@dataclass(frozen=True)
class Sampled:
    """Answers with their log-probs."""

    answer_BnT: Tensor
    logp_BnT: Tensor
    entropy: float
    """Mean entropy (nats) of the distributions that the tokens were drawn from."""


@torch.no_grad()
def sample(model: Decoder, prompt_BP: Tensor, members: int, generator: torch.Generator | None) -> Sampled:
    """``members`` answers to each prompt at temperature 1; greedy ones without a generator."""
    layout = Layout(model.prompt_tokens, members, model.answer_tokens, model.norm.dtype)
    batch, tokens, past, stop = len(prompt_BP), prompt_BP, None, model.prompt_tokens
    answers, logps, entropies = [], [], []
    for _ in range(model.answer_tokens):
        hidden, past = model.hidden(tokens, layout, slice(stop - tokens.shape[1], stop), past)
        if not answers:
            hidden = hidden[:, -1:].expand(-1, members, -1)
        logp = torch.log_softmax(model.head(hidden), dim=-1)
        p = logp.exp()
        if generator is None:
            tokens = p.argmax(-1)
        else:
            tokens = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(batch, members)
        answers.append(tokens)
        logps.append(logp.gather(-1, tokens[..., None])[..., 0])
        entropies.append(-(p * logp).sum(-1).mean().item())
        stop += members
    return Sampled(torch.stack(answers, dim=2), torch.stack(logps, dim=2), sum(entropies) / len(entropies))


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)
