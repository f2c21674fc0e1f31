import numpy as np
import pytest

from r2vpo.records import NO_VERSION, Outcome, Trajectory


def trajectory(logprob: float, outcome: Outcome, reward: float | None) -> Trajectory:
    return Trajectory(
        token_ids_T=np.array([5, 6], np.int32),
        loss_mask_T=np.array([False, True]),
        behavior_logprob_T=np.array([0.0, logprob], np.float32),
        version_T=np.array([NO_VERSION, 3], np.int32),
        outcome=outcome,
        reward=reward,
    )


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), float("-inf")])
def test_what_may_train_has_finite_log_probs_and_an_error_may_have_any(logprob):
    for outcome in (Outcome.SCORED, Outcome.TRUNCATED):
        with pytest.raises(ValueError, match=r"a behaviour log-prob is not finite.*outcome=error"):
            trajectory(logprob, outcome, 1.0)
    assert trajectory(logprob, Outcome.ERROR, None).num_trained_tokens == 1
    assert trajectory(-1.0, Outcome.SCORED, 1.0).reward == 1.0
