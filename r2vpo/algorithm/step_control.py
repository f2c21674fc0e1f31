"""The step size: warm-up, and the control that holds the mean of V at the budget by scaling the learning rate.

    V̄  = mean of V over optimiser steps 2..M of one learner step
    δ̂  = the budget of the batch, a share of δ (`budget.budget_share`)
    Vs ← 0.7·Vs + 0.3·min(V̄/δ̂, 5),  Vs₀ = 1
    s  ← clip(s·exp(g·clip(-log Vs, -1, 1)), 1/50, 50),   once per learner step;   lr_t = lr · warm-up · s
    g  = 0.3 downwards;  upwards 0.6, and 0.1 once Vs has crossed 1 from the side where it began (s has settled)

λ and s hold one budget: s its mean, λ the tails. Each part has a reason that was measured. The log of V̄ scatters by
0.3 to 0.7 from step to step; a control that follows each of them holds the median at δ, and the mean 30 % above it.
Smoothing first holds the mean within 10 %. A rate that is 10 times too high or low is home in a dozen steps.

Once settled, s falls fast and rises slowly. Near saturation V is small for many learner steps, and then one step of the
same length moves the policy far: a scale that had tripled meanwhile makes that step destroy what was learned.

The first optimiser step of a learner step is left out: nothing has moved yet, so its V is 0.

**What says nothing about the step size leaves it unchanged**: fewer than two optimiser steps, entries that are not
finite (dropped), V̄ = 0, which means that nothing moved at all and would otherwise read as "enlarge as fast as
possible", and a batch without any signal (δ̂ = 0).

See docs/budget.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, isfinite, log

from r2vpo.algorithm.config import AlgorithmConfig

_MEMORY = 0.7
_FALL, _RISE, _SETTLED_RISE = 0.3, 0.6, 0.1
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
        self.settled = False
        """Whether ``smoothed`` has crossed 1 from the side where it began."""

    def update(self, second_moment_M: Sequence[float], *, share: float) -> float:
        """Move the scale after one learner step; return the new one.

        ``second_moment_M`` holds V of its M optimiser steps in order; those skipped for want of tokens are not among
        them. ``share`` is δ̂/δ, in [0, 1].
        """
        assert 0 <= share <= 1, share
        informative = [v for v in second_moment_M[1:] if isfinite(v)]
        mean = sum(informative) / len(informative) if informative else 0.0
        if mean > 0 and share > 0:
            spent = min(mean / (self._delta * share), _CAP)
            self.smoothed = _MEMORY * self.smoothed + (1 - _MEMORY) * spent
            self.settled = self.settled or (self.smoothed - 1.0) * (self.scale - 1.0) > 0
            error = min(max(-log(self.smoothed), -1.0), 1.0)
            rise = _SETTLED_RISE if self.settled else _RISE
            gain = rise if error > 0 else _FALL
            self.scale = min(max(self.scale * exp(gain * error), 1 / _LIMIT), _LIMIT)
        return self.scale

    def state_dict(self) -> dict[str, float | bool]:
        """The scale, the smoothed V̄, and whether the scale has settled."""
        return {"scale": self.scale, "smoothed": self.smoothed, "settled": self.settled}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore exactly what `state_dict` gave. ``ValueError`` if ``state`` is not that of a step control."""
        _check_keys(state, self.state_dict())
        self.scale = state["scale"]
        self.smoothed = state["smoothed"]
        self.settled = bool(state["settled"])


class FixedStep:
    """The learning rate stays as configured; stateless."""

    scale = 1.0

    def update(self, second_moment_M: Sequence[float], *, share: float) -> float:
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
