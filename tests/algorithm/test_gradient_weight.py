"""The shape of the objectives, as documented in closed form."""

import pytest

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.gradient_weight import gradient_weight
from r2vpo.algorithm.objectives import objective


@pytest.mark.parametrize(
    ("name", "expected"),
    # A = 1, λ = 0.5, default settings
    [
        ("r2vpo", [0.75, 1.0, 0.99, 0.75, 0.0, -1.25]),  # u·(1 - (u - 1)), without the gate
        ("grpo", [0.5, 1.0, 1.1, 0.0, 0.0, 0.0]),
        ("spo", [1.75, 1.0, 0.55, -2.25, -8.0, -16.25]),  # ρ·(1 - (ρ - 1)/0.2)
        ("cispo", [0.8, 1.0, 1.1, 1.2, 1.2, 1.2]),
        ("truncated_is", [0.5, 1.0, 1.1, 1.5, 2.0, 2.0]),
        ("plain_is", [0.5, 1.0, 1.1, 1.5, 2.0, 2.5]),
    ],
)
def test_the_gradient_weight_by_ratio(name, expected):
    loss = objective(AlgorithmConfig(name=name, brake="everywhere"))
    assert gradient_weight(loss, [0.5, 1.0, 1.1, 1.5, 2.0, 2.5], 1.0, lam=0.5) == pytest.approx(expected, abs=1e-9)


def test_the_brake_lets_go_above_and_pulls_back_below():
    # λ = 0.5: u* = 2; A = -1: u·(-1 - (u - 1)) = -u², zero at u* = 0 alone
    loss = objective(AlgorithmConfig())
    assert gradient_weight(loss, [0.5, 1.1, 1.5, 2.0, 2.5], 1.0, lam=0.5) == pytest.approx([0.5, 0.99, 0.75, 0.0, 0.0])
    assert gradient_weight(loss, [0.5, 0.1, 1.1], -1.0, lam=0.5) == pytest.approx([-0.25, -0.01, -1.1])
    # λ = 2: u* = 0.75; beyond it 0.5·(-1 + 4·0.5)
    assert gradient_weight(loss, [0.5], -1.0, lam=2.0) == pytest.approx([0.5])


def test_lambda_sets_where_the_weight_is_zero():
    loss = objective(AlgorithmConfig())
    # u* = 1 + A/(2λ): 1 + 1/4 and 1 - 1/4
    assert gradient_weight(loss, [1.25], 1.0, lam=2.0) == pytest.approx([0.0], abs=1e-12)
    assert gradient_weight(loss, [0.75], -1.0, lam=2.0) == pytest.approx([0.0], abs=1e-12)
