"""Settings of the replay store."""

from __future__ import annotations

from dataclasses import dataclass

from r2vpo.checks import require


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How far a sample may lag behind the learner, and how much of a batch is drawn a second time."""

    max_lag: int = 2
    """Largest lag (learner steps) of a fresh token when it is trained; 0 is the synchronous on-policy algorithm."""
    max_replay_lag: int = 16
    """Largest lag (learner steps) of a stale token when it is trained again."""
    stale_fraction: float = 0.5
    """Share of a batch that is drawn from groups already consumed (0 to below 1)."""
    lease_s: float = 600.0
    """Seconds after which a prompt that was leased and not answered is handed out again."""

    def __post_init__(self) -> None:
        require.at_least("replay.max_lag", self.max_lag, 0)
        require.at_least("replay.max_replay_lag", self.max_replay_lag, 0)
        require.positive("replay.lease_s", self.lease_s)
        if not 0 <= self.stale_fraction < 1:
            raise ValueError(
                f"replay.stale_fraction={self.stale_fraction} must be at least 0 and below 1: a step needs fresh groups"
            )
        if self.stale_fraction > 0 and self.max_replay_lag < 1:
            raise ValueError(
                f"replay.max_replay_lag={self.max_replay_lag} allows no stale group although "
                f"replay.stale_fraction={self.stale_fraction}; set max_replay_lag to 1 or more, or stale_fraction=0"
            )

    def num_stale(self, groups_per_step: int) -> int:
        """Stale groups of a full batch: the configured share, rounded to the nearest group."""
        return round(groups_per_step * self.stale_fraction)

    def num_fresh(self, groups_per_step: int) -> int:
        """Fresh groups of every batch."""
        return groups_per_step - self.num_stale(groups_per_step)
