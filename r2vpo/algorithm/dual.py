"""The multiplier λ of the variance budget: how hard the penalty brakes.

    Vs ← 0.9·Vs + 0.1·min(V, 5·δ),  Vs₀ = δ
    λ  ← clip(λ·exp(0.1·clip(Vs/δ - 1, -1, 1)), lambda_min, lambda_max),  λ₀ = lambda_init

once per optimiser step. Each bound has a reason that was measured. V is heavy-tailed, so it is capped and smoothed
before it is compared: one token may not move λ for thousands of steps. V has a floor set by the step length, whatever λ
is, so λ has a ceiling: an infeasible budget would otherwise drive it until the penalty replaces the objective. And a
floor at which the brake still bites: where the step control holds the mean of V, λ would sink to any floor, and free
the tails, which nothing else holds.

λ pinned at its ceiling means that the budget is infeasible: lower the learning rate or raise δ, never the ceiling.

A V that is not finite says that the measurement is broken, not how far the policy moved: it changes nothing.

Beside this default stand the textbook's additive dual, whose faults these bounds are the answer to, and a fixed λ.

See docs/budget.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, isfinite

from r2vpo.algorithm.config import AlgorithmConfig

_MEMORY = 0.9
_RATE = 0.1
_CAP = 5.0


class BoundedDual:
    """λ follows the smoothed V/δ multiplicatively, within bounds."""

    def __init__(self, *, delta: float, lam: float, lam_min: float, lam_max: float) -> None:
        self._delta = delta
        self._lam_min = lam_min
        self._lam_max = lam_max
        self.lam = lam
        self.smoothed = delta

    @property
    def saturated(self) -> bool:
        """True while λ sits at its ceiling."""
        return self.lam >= self._lam_max

    def update(self, second_moment: float) -> float:
        """Move λ after one optimiser step whose minibatch measured V = ``second_moment``; return the new λ."""
        if not isfinite(second_moment):
            return self.lam
        self.smoothed = _MEMORY * self.smoothed + (1 - _MEMORY) * min(second_moment, _CAP * self._delta)
        error = min(max(self.smoothed / self._delta - 1, -1.0), 1.0)
        self.lam = min(max(self.lam * exp(_RATE * error), self._lam_min), self._lam_max)
        return self.lam

    def state_dict(self) -> dict[str, float]:
        """λ and the smoothed V."""
        return {"lam": self.lam, "smoothed": self.smoothed}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore exactly what `state_dict` gave. ``ValueError`` if ``state`` is that of another dual."""
        _check_keys(state, self.state_dict())
        self.lam = state["lam"]
        self.smoothed = state["smoothed"]


class AdditiveDual:
    """Gradient ascent on the multiplier, as textbooks have it: ``λ ← max(0, λ + rate·(V - δ))``.

    It winds up: one V of 30 raises λ by 30·rate, and as V ≥ 0 each later update lowers it by at most rate·δ.
    """

    saturated = False
    """There is no ceiling."""

    def __init__(self, *, delta: float, lam: float, rate: float) -> None:
        self._delta = delta
        self._rate = rate
        self.lam = lam

    def update(self, second_moment: float) -> float:
        """Move λ after one optimiser step whose minibatch measured V = ``second_moment``; return the new λ."""
        if isfinite(second_moment):
            self.lam = max(0.0, self.lam + self._rate * (second_moment - self._delta))
        return self.lam

    def state_dict(self) -> dict[str, float]:
        """λ."""
        return {"lam": self.lam}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore exactly what `state_dict` gave. ``ValueError`` if ``state`` is that of another dual."""
        _check_keys(state, self.state_dict())
        self.lam = state["lam"]


class FixedDual:
    """λ stays where it is; stateless."""

    saturated = False
    """A fixed λ has no ceiling."""

    def __init__(self, lam: float) -> None:
        self.lam = lam

    def update(self, second_moment: float) -> float:
        """Return λ, whatever V is."""
        return self.lam

    def state_dict(self) -> dict[str, float]:
        """Nothing: λ is a setting."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Accept the empty state. ``ValueError`` if ``state`` is that of another dual."""
        _check_keys(state, self.state_dict())


Dual = BoundedDual | AdditiveDual | FixedDual


def make_dual(config: AlgorithmConfig) -> Dual:
    """The dual variable that ``config.dual`` asks for; λ is 0 for an objective that has no penalty."""
    if not config.has_multiplier:
        return FixedDual(0.0)
    match config.dual:
        case "fixed":
            return FixedDual(config.lambda_init)
        case "additive":
            return AdditiveDual(delta=config.delta, lam=config.lambda_init, rate=config.dual_rate)
        case _:
            bounds = {"lam_min": config.lambda_min, "lam_max": config.lambda_max}
            return BoundedDual(delta=config.delta, lam=config.lambda_init, **bounds)


def _check_keys(state: Mapping[str, float], expected: Mapping[str, float]) -> None:
    if state.keys() != expected.keys():
        raise ValueError(
            f"the state of the dual has the entries {sorted(state)}, this run's dual has {sorted(expected)}; "
            "resume with the algorithm.dual that the checkpoint was written with"
        )
