"""The settings of the algorithm refuse what cannot work, with key and values."""

import pytest

from r2vpo.algorithm.config import AlgorithmConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "r2vp"}, "algorithm.name=r2vp .*did you mean r2vpo"),
        ({"dual": "additive"}, "algorithm.dual=additive"),
        ({"gate": "sometimes"}, "algorithm.gate=sometimes"),
        ({"advantage": "median"}, "algorithm.advantage=median"),
        ({"delta": 0.0}, "algorithm.delta=0.0"),
        ({"weight_cap": 0.5}, "algorithm.weight_cap=0.5"),
        ({"clip_low": 1.5}, "algorithm.clip_low=1.5"),
        ({"lambda_init": 2.0}, "algorithm.lambda_init=2.0 .*algorithm.lambda_max=1.0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**settings)


@pytest.mark.parametrize(
    ("gate", "off_policy", "gated"),
    [("auto", False, False), ("auto", True, True), ("always", False, True), ("never", True, False)],
)
def test_the_gate_follows_replay_and_lag_unless_fixed(gate, off_policy, gated):
    assert AlgorithmConfig(gate=gate).is_gated(off_policy=off_policy) is gated
