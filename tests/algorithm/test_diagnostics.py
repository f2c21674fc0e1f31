"""Statistics by lag bucket."""

from math import exp, isfinite, log

import pytest
import torch

from r2vpo.algorithm.diagnostics import LAG_BUCKETS, LagDiagnostics
from r2vpo.algorithm.objectives import TokenBatch

STATISTICS = {"tokens", "second_moment", "ratio_second_moment", "ratio_mean", "ess", "kl", "weight_mean"}


def make_tokens(u, w):
    """float64 tokens with the given update ratios and uncapped reweightings."""
    log_u_N, log_w_N = torch.tensor(u, dtype=torch.float64).log(), torch.tensor(w, dtype=torch.float64).log()
    return TokenBatch(
        logp_N=log_u_N.requires_grad_(),
        logp_prox_N=torch.zeros_like(log_u_N),
        behavior_logp_N=-log_w_N,
        advantage_N=torch.zeros_like(log_u_N),
    )


def measure(tokens, lags):
    diagnostics = LagDiagnostics(weight_cap=2.0)
    diagnostics.add(tokens, torch.tensor(lags))
    return diagnostics.metrics()


def test_every_statistic_by_hand():
    metrics = measure(make_tokens([1.5, 0.5], [1.0, 4.0]), [2, 3])
    expected = {  # ρ = 1.5 and 2
        "tokens": 2.0,
        "second_moment": 0.25,
        "ratio_second_moment": (0.25 + 1.0) / 2,
        "ratio_mean": 1.75,
        "ess": 3.5**2 / (2 * 6.25),
        "kl": (0.5 - log(1.5) + 1.0 - log(2.0)) / 2,
        "weight_mean": 1.5,
    }
    assert metrics.keys() == {f"{p}/{s}" for p in ("lag/2-3", "ratio") for s in STATISTICS}
    for name, value in expected.items():
        assert metrics[f"lag/2-3/{name}"] == pytest.approx(value), name
        assert metrics[f"ratio/{name}"] == pytest.approx(value), name


def test_bucket_bounds():
    lags = [0, 1, 2, 3, 4, 7, 8, 15, 16, 63, 64, 10**6]
    metrics = measure(make_tokens([1.0] * 12, [1.0] * 12), lags)
    assert [metrics[f"lag/{name}/tokens"] for name in LAG_BUCKETS] == [1, 1, 2, 2, 2, 2, 2]
    assert metrics["ratio/tokens"] == 12


def test_empty_buckets_are_left_out():
    assert LagDiagnostics(weight_cap=2.0).metrics() == {}
    metrics = measure(make_tokens([1.0], [1.0]), [5])
    assert {key.rsplit("/", 1)[0] for key in metrics} == {"lag/4-7", "ratio"}


def test_on_policy_tokens_have_full_effective_size_and_no_divergence():
    metrics = measure(make_tokens([1.0, 1.0], [1.0, 1.0]), [0, 0])
    assert metrics["lag/0/ess"] == 1.0
    assert metrics["lag/0/kl"] == 0.0
    assert metrics["lag/0/second_moment"] == 0.0


def test_kl_is_that_of_behavior_against_current():
    # Over all tokens of a vocabulary, in proportion to the behaviour b = (3/4, 1/4) with π = (1/2, 1/2):
    # KL(b ‖ π) = 3/4·log(3/2) + 1/4·log(1/2), which is not KL(π ‖ b)
    ratios = [2 / 3, 2 / 3, 2 / 3, 2.0]
    metrics = measure(make_tokens(ratios, [1.0] * 4), [0] * 4)
    assert metrics["ratio/kl"] == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5))
    assert metrics["ratio/ratio_mean"] == pytest.approx(1.0)


def test_sums_of_ranks_add_up():
    u, w, lags = [1.5, 0.5, 1.1, 0.9], [1.0, 4.0, 0.5, 1.0], [0, 3, 3, 70]
    first, second = LagDiagnostics(weight_cap=2.0), LagDiagnostics(weight_cap=2.0)
    first.add(make_tokens(u[:1], w[:1]), torch.tensor(lags[:1]))
    second.add(make_tokens(u[1:3], w[1:3]), torch.tensor(lags[1:3]))
    second.add(make_tokens([], []), torch.tensor([], dtype=torch.long))
    second.add(make_tokens(u[3:], w[3:]), torch.tensor(lags[3:]))
    first.sums += second.sums
    assert first.metrics() == pytest.approx(measure(make_tokens(u, w), lags))


def test_log_ratios_of_fifty_stay_finite():
    for log_ratios in ([50.0, -50.0], [50.0], [-50.0, -50.0]):
        logp_N = torch.tensor(log_ratios, dtype=torch.float32)
        zero_N = torch.zeros_like(logp_N)
        tokens = TokenBatch(logp_N=logp_N, logp_prox_N=zero_N, behavior_logp_N=zero_N, advantage_N=zero_N)
        metrics = measure(tokens, [9] * len(log_ratios))
        assert all(isfinite(v) for v in metrics.values())
        assert 0 < metrics["ratio/ess"] <= 1 + 1e-12
    assert metrics["ratio/ratio_mean"] == pytest.approx(exp(-50))


def test_a_token_newer_than_the_learner_is_a_bug():
    with pytest.raises(AssertionError, match="newer"):
        measure(make_tokens([1.0], [1.0]), [-1])
