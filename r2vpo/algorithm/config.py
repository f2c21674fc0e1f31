"""Settings of the objective, its dual variable and the step control."""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo.checks import require

OBJECTIVES = (
    "r2vpo",
    "r2vpo_sequence",
    "grpo",
    "grpo_decoupled",
    "gspo",
    "cispo",
    "spo",
    "sapo",
    "m2po",
    "truncated_is",
    "plain_is",
)
"""Names of the objectives."""

ADVANTAGES = ("mean_std", "mean", "leave_one_out", "batch_whitened")
"""Names of the advantages."""

BRAKES = ("asymmetric", "saturating", "gated", "everywhere")
"""Names of what λ does to a token that has moved."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """What the learner optimises, and how the budget on the ratio's variance is held."""

    name: str = "r2vpo"
    """The objective: `r2vpo`; `r2vpo_sequence` (length-normalised sequence ratio); `grpo` (clip on the plain ratio);
    `grpo_decoupled` (clip on the update ratio, bounded reweighting); `gspo`, `cispo`, `spo`, `sapo`, `m2po`,
    `truncated_is`, `plain_is`. See docs/loss.md."""
    delta: float = 0.04
    """Budget on V, the second moment of the update ratio, of a large batch (dimensionless; 0.04 is what a clip of 0.2
    allows at most). A batch has less of it if few groups carry a signal, or if many are solved."""
    dual: str = "bounded"
    """`bounded`: λ follows V multiplicatively within its bounds; `additive`: the textbook's
    λ ← max(0, λ + dual_rate·(V − δ)), which winds up on heavy tails; `fixed`: λ stays at `lambda_init`."""
    dual_rate: float = 1.0
    """Rate of λ under `dual: additive` (λ per unit of V)."""
    lambda_init: float = 1.0
    """Multiplier λ at the start."""
    lambda_min: float = 0.7
    """Floor of λ under `dual: bounded`."""
    lambda_max: float = 1.5
    """Ceiling of λ under `dual: bounded`; λ pinned here means that the budget is infeasible."""
    brake: str = "asymmetric"
    """How λ brakes a token: `gated`: only where it moves as its advantage pushes it; beyond the point where it has no
    gradient left it is pulled back. `asymmetric`: there a token that has risen is let go, and only one that has fallen
    is pulled back; `saturating`: both are let go. `everywhere`: every token that has moved."""
    step_control: bool | None = None
    """Hold the mean of V at delta by scaling the step size; null means on for `r2vpo` and `r2vpo_sequence`."""
    end_early: bool | None = None
    """End a learner step once a minibatch measures V above twice its budget; null means on where step_control is."""
    weight_cap: float = 2.0
    """Upper bound of the reweighting w of stale tokens, and of the ratio's weight under `truncated_is`."""
    clip_low: float = 0.2
    """`grpo`, `grpo_decoupled`, `gspo`, `cispo`: the ratio is clipped below at 1 - clip_low."""
    clip_high: float = 0.2
    """The same: the ratio is clipped above at 1 + clip_high. `spo`: its ε."""
    tau_positive: float = 1.0
    """`sapo`: temperature where the advantage is above 0; the larger, the faster a token loses its weight."""
    tau_negative: float = 1.05
    """`sapo`: temperature elsewhere."""
    m2_limit: float = 0.04
    """`m2po`: bound on the mean squared log-ratio (nats²) of the tokens that move where their advantage pushes them."""
    advantage: str = "mean_std"
    """Reward minus the group's mean, and then: `mean_std` divides by the group's standard deviation; `mean` does
    nothing; `leave_one_out` takes the mean of the others instead; `batch_whitened` divides by the deviation over the
    whole batch of a learner step."""
    loss_mean: str = "token"
    """What the loss is a mean over: `token`: all trained tokens of a minibatch alike; `sequence`: trajectories, each
    the mean of its tokens; `constant`: trajectories, each the sum of its tokens divided by `loss_length`."""
    loss_length: int | None = None
    """Length (tokens) that `loss_mean: constant` divides by, such as `rollout.max_tokens`."""

    def __post_init__(self) -> None:
        require.one_of("algorithm.name", self.name, OBJECTIVES)
        require.one_of("algorithm.brake", self.brake, BRAKES)
        require.one_of("algorithm.dual", self.dual, ("bounded", "additive", "fixed"))
        require.one_of("algorithm.advantage", self.advantage, ADVANTAGES)
        require.one_of("algorithm.loss_mean", self.loss_mean, ("token", "sequence", "constant"))
        require.positive("algorithm.delta", self.delta)
        require.positive("algorithm.dual_rate", self.dual_rate)
        require.at_least("algorithm.lambda_init", self.lambda_init, 0.0)
        require.positive("algorithm.lambda_min", self.lambda_min)
        require.at_least("algorithm.weight_cap", self.weight_cap, 1.0)
        require.between("algorithm.clip_low", self.clip_low, 0.0, 1.0)
        require.positive("algorithm.clip_high", self.clip_high)
        require.positive("algorithm.tau_positive", self.tau_positive)
        require.positive("algorithm.tau_negative", self.tau_negative)
        require.positive("algorithm.m2_limit", self.m2_limit)
        if (self.loss_length is None) == (self.loss_mean == "constant"):
            raise ValueError(
                f"algorithm.loss_mean={self.loss_mean} with algorithm.loss_length={self.loss_length}: `constant` needs "
                "a length to divide by, and the other means have none; set both or neither"
            )
        if self.loss_length is not None:
            require.positive("algorithm.loss_length", self.loss_length)
        if self.dual == "bounded" and not self.lambda_min <= self.lambda_init <= self.lambda_max:
            raise ValueError(
                f"algorithm.lambda_init={self.lambda_init} lies outside [algorithm.lambda_min={self.lambda_min}, "
                f"algorithm.lambda_max={self.lambda_max}]; choose a start between the bounds"
            )

    @property
    def controls_step(self) -> bool:
        """Whether the step size is scaled to hold the budget."""
        return self.has_multiplier if self.step_control is None else self.step_control

    @property
    def ends_early(self) -> bool:
        """Whether a learner step ends once its budget is exceeded."""
        return self.controls_step if self.end_early is None else self.end_early

    @property
    def has_multiplier(self) -> bool:
        """Whether the objective has a penalty that λ multiplies."""
        return self.name in ("r2vpo", "r2vpo_sequence")
