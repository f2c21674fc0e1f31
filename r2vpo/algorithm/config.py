"""Settings of the objective, its dual variable and the step control."""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo.checks import require


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """What the learner optimises, and how the budget on the ratio's variance is held."""

    name: str = "r2vpo"
    """`r2vpo`, `grpo` (clip on the plain ratio) or `grpo_decoupled` (clip on the update ratio, bounded reweighting)."""
    delta: float = 0.02
    """Budget on V, the second moment of the update ratio (dimensionless; 0.04 is what a clip of 0.2 allows at most)."""
    dual: str = "bounded"
    """`bounded`: λ follows V multiplicatively within its bounds; `fixed`: λ stays at `lambda_init`."""
    lambda_init: float = 0.5
    """Multiplier λ at the start."""
    lambda_min: float = 0.25
    """Floor of λ under `dual: bounded`."""
    lambda_max: float = 1.0
    """Ceiling of λ under `dual: bounded`; λ pinned here means that the budget is infeasible."""
    gate: str = "auto"
    """`always` brakes only tokens that run away, `never` brakes all, `auto` is `always` with replay or lag."""
    step_control: bool | None = None
    """Hold the mean of V at delta by scaling the step size; null means on for r2vpo and off for the GRPO baselines."""
    weight_cap: float = 2.0
    """Upper bound of the reweighting w of stale tokens."""
    clip_low: float = 0.2
    """GRPO: the ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """GRPO: the ratio is clipped above at 1 + clip_high."""
    advantage: str = "mean_std"
    """Group-relative advantage: `mean_std` divides by the group's standard deviation, `mean` only centres."""

    def __post_init__(self) -> None:
        require.one_of("algorithm.name", self.name, ("r2vpo", "grpo", "grpo_decoupled"))
        require.one_of("algorithm.dual", self.dual, ("bounded", "fixed"))
        require.one_of("algorithm.gate", self.gate, ("auto", "always", "never"))
        require.one_of("algorithm.advantage", self.advantage, ("mean_std", "mean"))
        require.positive("algorithm.delta", self.delta)
        require.positive("algorithm.lambda_min", self.lambda_min)
        require.at_least("algorithm.weight_cap", self.weight_cap, 1.0)
        require.between("algorithm.clip_low", self.clip_low, 0.0, 1.0)
        require.positive("algorithm.clip_high", self.clip_high)
        if not self.lambda_min <= self.lambda_init <= self.lambda_max:
            raise ValueError(
                f"algorithm.lambda_init={self.lambda_init} lies outside [algorithm.lambda_min={self.lambda_min}, "
                f"algorithm.lambda_max={self.lambda_max}]; choose a start between the bounds"
            )

    @property
    def controls_step(self) -> bool:
        """Whether the step size is scaled to hold the budget."""
        return self.name == "r2vpo" if self.step_control is None else self.step_control

    def is_gated(self, *, off_policy: bool) -> bool:
        """Whether the penalty is gated, given that tokens may be stale (replay or lag) or not."""
        return off_policy if self.gate == "auto" else self.gate == "always"
