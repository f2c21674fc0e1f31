"""The step size: warm-up, and the control that holds the mean of V at δ by scaling the learning rate.

    V̄ = mean of V over optimiser steps 2..M of one learner step
    s ← clip(s·exp(0.5·clip(log(δ/V̄), -1, 1)), 1/50, 50),   once per learner step;   lr_t = lr · warm-up · s

V grows with the square of the step length, so half the log-error is the step that removes it. λ and s hold one budget:
s its mean, λ the tails.

The first optimiser step of a learner step is left out: its V is measured before anything has moved (0 on-policy).

**What says nothing about the step size leaves it unchanged**: fewer than two optimiser steps, entries that are not
finite (dropped), and V̄ = 0, which means that nothing moved at all and would otherwise read as "enlarge as fast as
possible". For the same reason the caller reports a batch in which every advantage is 0 as no optimiser steps,
``update(())``: only Adam's momentum and weight decay move the policy then, and a task that stays solved for a few steps
would let the scale climb to its ceiling, to be paid for by the first batch with a signal.

See docs/budget.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, isfinite, log

from r2vpo.algorithm.config import AlgorithmConfig

_RATE = 0.5
_LIMIT = 50.0


def warmup_factor(optimizer_step: int, warmup_steps: int) -> float:
    """Linear warm-up: ``(k + 1) / warmup_steps``, at most 1, for the 0-based optimiser step k."""
    return 1.0 if optimizer_step + 1 >= warmup_steps else (optimizer_step + 1) / warmup_steps


class StepControl:
    """Scales the learning rate so that the mean of V stays at δ."""

    def __init__(self, delta: float) -> None:
        self._delta = delta
        self.scale = 1.0

    def update(self, second_moment_M: Sequence[float]) -> float:
        """Move the scale after one learner step; return the new one.

        ``second_moment_M`` holds V of its M optimiser steps in order; those skipped for want of tokens are not among
        them, and for a batch without any signal it is empty (the module docstring says why).
        """
        informative = [v for v in second_moment_M[1:] if isfinite(v)]
        mean = sum(informative) / len(informative) if informative else 0.0
        if mean > 0:
            error = min(max(log(self._delta) - log(mean), -1.0), 1.0)
            self.scale = min(max(self.scale * exp(_RATE * error), 1 / _LIMIT), _LIMIT)
        return self.scale

    def state_dict(self) -> dict[str, float]:
        """The scale."""
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore exactly what `state_dict` gave. ``ValueError`` if ``state`` is not that of a step control."""
        _check_keys(state, self.state_dict())
        self.scale = state["scale"]


class FixedStep:
    """The learning rate stays as configured; stateless."""

    scale = 1.0

    def update(self, second_moment_M: Sequence[float]) -> float:
        """Return 1, whatever V is."""
        return self.scale

    def state_dict(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Accept the empty state. ``ValueError`` if ``state`` is that of a step control."""
        _check_keys(state, self.state_dict())


def make_step_control(config: AlgorithmConfig) -> StepControl | FixedStep:
    """A step control, or a step that stays fixed, as ``config.controls_step`` asks for."""
    return StepControl(config.delta) if config.controls_step else FixedStep()


def _check_keys(state: Mapping[str, float], expected: Mapping[str, float]) -> None:
    if state.keys() != expected.keys():
        raise ValueError(
            f"the state of the step control has the entries {sorted(state)}, this run's has {sorted(expected)}; "
            "resume with the algorithm.name and algorithm.step_control that the checkpoint was written with"
        )
