"""The step size: warm-up, and the control that holds the mean of V at the budget by scaling the learning rate.

    V̄  = mean of V over optimiser steps 2..M of one learner step
    δ̂  = δ · q,  q = share of the batch's fresh groups that carry a signal (`budget.signal_share`)
    Vs ← 0.7·Vs + 0.3·min(V̄/δ̂, 5),  Vs₀ = 1
    s  ← clip(s·exp(0.3·clip(-log Vs, -1, 1)), 1/50, 50),   once per learner step;   lr_t = lr · warm-up · s

λ and s hold one budget: s its mean, λ the tails. Each part has a reason that was measured. The log of V̄ scatters by
0.3 to 0.7 from step to step; a control that follows each of them holds the median at δ, and the mean 30 % above it.
Smoothing first holds the mean within 10 %. The gain of 0.3 brings a rate that is 10 times too high or low home in a
dozen steps.

The first optimiser step of a learner step is left out: nothing has moved yet, so its V is 0.

**What says nothing about the step size leaves it unchanged**: fewer than two optimiser steps, entries that are not
finite (dropped), V̄ = 0, which means that nothing moved at all and would otherwise read as "enlarge as fast as
possible", and a batch without any signal (q = 0).

See docs/budget.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, isfinite, log

from r2vpo.algorithm.config import AlgorithmConfig

_MEMORY = 0.7
_RATE = 0.3
_CAP = 5.0
_LIMIT = 50.0


def warmup_factor(optimizer_step: int, warmup_steps: int) -> float:
    """Linear warm-up: ``(k + 1) / warmup_steps``, at most 1, for the 0-based optimiser step k."""
    return 1.0 if optimizer_step + 1 >= warmup_steps else (optimizer_step + 1) / warmup_steps


class StepControl:
    """Scales the learning rate so that the mean of V stays at the budget."""

    def __init__(self, delta: float) -> None:
        self._delta = delta
        self.scale = 1.0
        self.smoothed = 1.0
        """V̄ over the budget of its batch, capped and smoothed."""

    def update(self, second_moment_M: Sequence[float], *, signal_share: float) -> float:
        """Move the scale after one learner step; return the new one.

        ``second_moment_M`` holds V of its M optimiser steps in order; those skipped for want of tokens are not among
        them. ``signal_share`` is q, in [0, 1].
        """
        assert 0 <= signal_share <= 1, signal_share
        informative = [v for v in second_moment_M[1:] if isfinite(v)]
        mean = sum(informative) / len(informative) if informative else 0.0
        if mean > 0 and signal_share > 0:
            spent = min(mean / (self._delta * signal_share), _CAP)
            self.smoothed = _MEMORY * self.smoothed + (1 - _MEMORY) * spent
            error = min(max(-log(self.smoothed), -1.0), 1.0)
            self.scale = min(max(self.scale * exp(_RATE * error), 1 / _LIMIT), _LIMIT)
        return self.scale

    def state_dict(self) -> dict[str, float]:
        """The scale and the smoothed V̄."""
        return {"scale": self.scale, "smoothed": self.smoothed}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore exactly what `state_dict` gave. ``ValueError`` if ``state`` is not that of a step control."""
        _check_keys(state, self.state_dict())
        self.scale = state["scale"]
        self.smoothed = state["smoothed"]


class FixedStep:
    """The learning rate stays as configured; stateless."""

    scale = 1.0

    def update(self, second_moment_M: Sequence[float], *, signal_share: float) -> float:
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
