"""Statistics of the ratio by lag: where the budget is spent, and what stale tokens are still worth."""

from __future__ import annotations

import torch
from torch import Tensor

from r2vpo.algorithm.tokens import TokenBatch, reweighting

LAG_BUCKETS = ("0", "1", "2-3", "4-7", "8-15", "16-63", "64+")
"""Names of the lag buckets (learner steps, bounds included)."""

_BUCKET_STARTS = (1, 2, 4, 8, 16, 64)
_NUM_SUMS = 7
_LIMIT = 100.0
"""Log-ratios (nats) are measured up to this magnitude: the squares of their ratios are far inside float64."""


class LagDiagnostics:
    """Additive statistics of tokens, by lag bucket. They describe the tokens drawn: importance weights are left out.

    ``sums`` is float64 ``[buckets, 7]``: count, Σ(u-1)², Σ(ρ-1)², Σρ, Σρ², Σ(ρ-1-log ρ), Σw. All are sums, so those of
    several ranks may be added (all-reduced in place) before `metrics` is called.
    """

    def __init__(self, *, weight_cap: float, device: torch.device | str = "cpu") -> None:
        self._weight_cap = weight_cap
        self._starts = torch.tensor(_BUCKET_STARTS, device=device)
        self.sums = torch.zeros(len(LAG_BUCKETS), _NUM_SUMS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, tokens: TokenBatch, lag_N: Tensor) -> None:
        """Count N trained tokens with their lags (integer ``[N]``, at least 0), once per token and optimiser step."""
        assert lag_N.shape == tokens.logp_N.shape, f"{lag_N.shape} lags for {tokens.logp_N.shape} tokens"
        assert bool((lag_N >= 0).all()), "a token cannot be newer than the learner"
        log_ratio_N = _measured(tokens.logp_N - tokens.behavior_logp_N)
        log_u_N = _measured(tokens.logp_N - tokens.logp_prox_N)
        ratio_N, ratio_excess_N = log_ratio_N.exp(), torch.expm1(log_ratio_N)
        terms = (
            torch.ones_like(ratio_N),
            torch.expm1(log_u_N).square(),
            ratio_excess_N.square(),
            ratio_N,
            ratio_N.square(),
            ratio_excess_N - log_ratio_N,
            reweighting(tokens, self._weight_cap).double(),
        )
        bucket_N = torch.bucketize(lag_N, self._starts, right=True)
        self.sums.index_add_(0, bucket_N, torch.stack(terms, dim=1))

    def metrics(self) -> dict[str, float]:
        """Statistics as ``lag/<bucket>/<name>`` of the buckets that hold tokens, and over all tokens ``ratio/<name>``.

        ``tokens``: count. ``second_moment``: mean (u-1)². ``ratio_second_moment``: mean (ρ-1)². ``ratio_mean``: mean
        ρ, 1 in expectation. ``ess``: normalised effective sample size (Σρ)² / (n·Σρ²), in (0, 1]. ``kl``: mean
        ρ-1-log ρ (the k3 estimator), which on tokens sampled from the behaviour policy estimates
        KL(behaviour ‖ current), in nats per token. ``weight_mean``: mean w.
        """
        named = {f"lag/{name}": row for name, row in zip(LAG_BUCKETS, self.sums, strict=True)}
        named["ratio"] = self.sums.sum(0)
        return {
            f"{prefix}/{name}": value
            for prefix, row in named.items()
            if row[0] > 0
            for name, value in _statistics(row.tolist()).items()
        }


def _statistics(sums: list[float]) -> dict[str, float]:
    count, update_excess, ratio_excess, ratio, ratio_square, divergence, weight = sums
    return {
        "tokens": count,
        "second_moment": update_excess / count,
        "ratio_second_moment": ratio_excess / count,
        "ratio_mean": ratio / count,
        "ess": ratio**2 / (count * ratio_square),
        "kl": divergence / count,
        "weight_mean": weight / count,
    }


def _measured(log_ratio_N: Tensor) -> Tensor:
    return log_ratio_N.double().clamp(-_LIMIT, _LIMIT)
