"""The settings of the algorithm refuse what cannot work, with key and values."""

import pytest

from r2vpo.algorithm.config import OBJECTIVES, AlgorithmConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "r2vp"}, "algorithm.name=r2vp .*did you mean r2vpo"),
        ({"dual": "adaptive"}, "algorithm.dual=adaptive .*did you mean additive"),
        ({"dual_rate": 0.0}, "algorithm.dual_rate=0.0"),
        ({"dual": "fixed", "lambda_init": -0.1}, "algorithm.lambda_init=-0.1"),
        ({"tau_negative": 0.0}, "algorithm.tau_negative=0.0"),
        ({"m2_limit": 0.0}, "algorithm.m2_limit=0.0"),
        ({"loss_mean": "group"}, "algorithm.loss_mean=group is not one of token, sequence, constant"),
        ({"loss_mean": "constant"}, "algorithm.loss_mean=constant with algorithm.loss_length=None"),
        ({"loss_length": 100}, "algorithm.loss_mean=token with algorithm.loss_length=100"),
        ({"loss_mean": "constant", "loss_length": 0}, "algorithm.loss_length=0"),
        ({"advantage": "median"}, "algorithm.advantage=median"),
        ({"delta": 0.0}, "algorithm.delta=0.0"),
        ({"weight_cap": 0.5}, "algorithm.weight_cap=0.5"),
        ({"clip_low": 1.5}, "algorithm.clip_low=1.5"),
        ({"lambda_init": 2.0}, "algorithm.lambda_init=2.0 .*algorithm.lambda_max=1.5"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig(**settings)


def test_the_bounds_of_lambda_bind_only_the_dual_that_has_them():
    assert AlgorithmConfig(dual="fixed", lambda_init=2.0).lambda_init == 2.0
    assert AlgorithmConfig(dual="additive", lambda_init=0.0).lambda_init == 0.0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_is_controlled_where_there_is_a_multiplier_unless_set(name):
    config = AlgorithmConfig(name=name)
    assert config.controls_step is config.has_multiplier is (name in ("r2vpo", "r2vpo_sequence"))
    assert AlgorithmConfig(name=name, step_control=True).controls_step
