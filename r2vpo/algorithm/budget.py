"""One budget δ on the second moment V, and the three actuators that hold it.

| actuator | holds | acts | file |
|---|---|---|---|
| multiplier λ | the tails: tokens that run away | once per optimiser step | `dual.py` |
| step scale s | the mean of V | once per learner step | `step_control.py` |
| end of the learner step | what the other two let through | as soon as V exceeds 2·δ̂ | here |

δ̂, the budget of a batch, is a share of δ: less where there is little to learn from or much to lose (see
`budget_share`). All three compare V with it, so that one number is all there is to choose.

The first optimiser step of a learner step measures V before anything has moved: it says nothing, and no actuator looks
at it. (Averaging that 0 in would let λ sink to its floor, since s holds the mean of all the others.)

**Ending early.** V measured above 2·δ̂ means that the policy has moved by more than its budget since the batch was
taken; what is left of the batch, and of its further passes, would be trained on from too far away. Groups that were not
trained on so stay in the store and may be drawn again.

See docs/budget.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, isfinite
from statistics import fmean
from typing import Any, NamedTuple

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.algorithm.dual import make_dual
from r2vpo.algorithm.step_control import make_step_control

_TOO_FAR = 2.0
_NOISE_SCALE = 32
"""Groups with a signal at which a batch has half of δ. Chosen on batches of 32, 256 and 512 groups."""


class GroupSignal(NamedTuple):
    """What the budget asks of a group that trains."""

    is_fresh: bool
    has_signal: bool
    """Whether its rewards differ: advantages other than 0."""
    reward: float
    """Mean over its trajectories with a verdict."""


def budget_share(groups: Iterable[GroupSignal]) -> float:
    """δ̂/δ of a batch, in [0, 1): n / (n + 32) for its n groups with a signal, times the square of the unsolved share.

    Among fresh groups, the share that is not solved; it counts one group more, so that it is never 0. The result is 0
    if no group has a signal.

    What a step gains depends on how well n groups tell the gradient from its noise. The best step is n / (n + n₀)
    times the gradient of the batch, n₀ being the noise scale, here in groups (arXiv 1812.06162, section 2.2). The
    square of that gradient goes as (n + n₀) / n, so the best V, a squared length, goes as n / (n + n₀). What a step
    spoils grows with V and with what was right without it. A group is *solved* if its rewards are all equal, and not
    below the mean of the batch: it has nothing to teach, and can only be unlearned. Groups whose answers are all wrong
    have nothing to lose.

    Stale groups do not count as solved or unsolved: they are drawn for their signal, so a batch may be full of it when
    all but a few of today's answers are right.
    """
    known = list(groups)
    with_signal = sum(group.has_signal for group in known)
    if not with_signal:
        return 0.0
    mean = fmean(group.reward for group in known)
    fresh = [group for group in known if group.is_fresh]
    unsolved = (1 + sum(g.has_signal or g.reward < mean for g in fresh)) / (1 + len(fresh))
    return with_signal / (with_signal + _NOISE_SCALE) * unsolved**2


class Budget:
    """What a learner asks before, during and after each of its steps."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self.dual = make_dual(config)
        self.step_control = make_step_control(config)
        self._limit = _TOO_FAR * config.delta if config.ends_early else inf
        self._share = 0.0
        self._second_moments: list[float] = []

    @property
    def lam(self) -> float:
        """The multiplier λ."""
        return self.dual.lam

    @property
    def scale(self) -> float:
        """The factor s of the learning rate."""
        return self.step_control.scale

    def begin(self, *, share: float) -> None:
        """A learner step begins, on a batch with this `budget_share`."""
        self._share, self._second_moments = share, []

    def observe(self, second_moment: float) -> bool:
        """An optimiser step was made whose minibatch measured V. Returns whether the learner step may go on."""
        self._second_moments.append(second_moment)
        if len(self._second_moments) == 1 or self._share == 0 or not isfinite(second_moment):
            return True
        self.dual.update(second_moment / self._share)
        return second_moment <= self._limit * self._share

    def end(self) -> None:
        """The learner step is over."""
        self.step_control.update(self._second_moments, share=self._share)

    def state_dict(self) -> dict[str, Any]:
        """State between two learner steps: that of ``dual`` and that of ``step_control``."""
        return {"dual": self.dual.state_dict(), "step_control": self.step_control.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore exactly what `state_dict` gave. ``ValueError`` if ``state`` is that of other actuators."""
        self.dual.load_state_dict(state["dual"])
        self.step_control.load_state_dict(state["step_control"])
