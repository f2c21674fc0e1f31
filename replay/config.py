"""Settings of the replay store: what is sampled, what is evicted, who waits for whom."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from r2vpo.checks import require

SAMPLE = ("fresh", "mixed", "priority", "window")
PRIORITY = ("advantage", "age", "uses")
SKIP = ("none", "stale", "all")
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """How far a sample may lag behind the learner, how a batch is drawn, and how much the store keeps."""

    sample: str = "mixed"
    """How a batch is drawn: `fresh` (each group once, in order), `mixed` (fresh first, then stale ones, uniformly),
    `priority` (the same, stale ones by `priority`) or `window` (uniformly from all within `max_replay_lag`)."""
    max_lag: int = 2
    """Largest lag (learner steps) of a fresh token when it is trained; 0 is the synchronous on-policy algorithm."""
    max_replay_lag: int = 16
    """Largest lag (learner steps) of a stale token when it is trained again."""
    stale_fraction: float = 0.5
    """Share of a batch that is drawn from groups already consumed (0 to below 1); for `mixed` and `priority`."""
    samples_per_insert: float | None = None
    """How often a new group is trained on, on average (1 or more). `window` needs it: it decides how many new groups a
    step waits for. Elsewhere null: it follows from `stale_fraction`, and a number is an upper bound on it."""
    priority: str = "advantage"
    """What makes `priority` draw a group more often: large |`advantage`|, low `age` or few `uses`."""
    priority_exponent: float = 1.0
    """How strongly (0 to 100): 0 draws uniformly."""
    max_uses: int | None = None
    """Learner steps that may train on one group; its payload is then evicted. null is any number."""
    min_verdicts: int = 2
    """Members of a group that must have a verdict (2 or more) for it to be trained on; those without are left out."""
    skip_no_signal: str = "stale"
    """Which groups with equal rewards, all of them stored and counted, are not drawn: `none`, those that would be drawn
    again (`stale`), or `all`. `window`, which may draw any group again, takes `stale` as `all`."""
    evict_after_lag: int | None = None
    """Evict payloads of groups whose lag exceeds this (learner steps); null keeps all, for `replay-step`."""
    capacity_groups: int | None = None
    """Most groups whose payloads are kept; the oldest are evicted first. null is any number."""
    capacity_gb: float | None = None
    """Most GiB of payloads that are kept; the oldest are evicted first. null is any amount."""
    shards: int = 1
    """Replay shards: actors with a file each, over which groups are spread by the hash of their prompt's key."""
    directory: str | None = None
    """Folder on a disk of the node itself for the store's files, where `run_dir` lies on a network file system: the run
    gets a folder of its name in it, on every node with a shard. null keeps them in the run's folder."""
    lease_s: float = 600.0
    """Seconds after which a prompt that was leased and not answered is handed out again."""

    def __post_init__(self) -> None:
        require.one_of("replay.sample", self.sample, SAMPLE)
        require.one_of("replay.priority", self.priority, PRIORITY)
        require.one_of("replay.skip_no_signal", self.skip_no_signal, SKIP)
        require.at_least("replay.max_lag", self.max_lag, 0)
        require.at_least("replay.max_replay_lag", self.max_replay_lag, 0)
        require.between("replay.priority_exponent", self.priority_exponent, 0.0, 100.0)
        require.at_least("replay.shards", self.shards, 1)
        require.positive("replay.lease_s", self.lease_s)
        if self.min_verdicts < 2:
            raise ValueError(
                f"replay.min_verdicts={self.min_verdicts} is less than 2: a lone verdict has nothing to be compared "
                "with, and gives no advantage; set it to 2 or more"
            )
        if not 0 <= self.stale_fraction < 1:
            raise ValueError(
                f"replay.stale_fraction={self.stale_fraction} must be at least 0 and below 1: a step needs fresh groups"
            )
        for key, value in (("max_uses", self.max_uses), ("capacity_groups", self.capacity_groups)):
            if value is not None:
                require.at_least(f"replay.{key}", value, 1)
        if self.capacity_gb is not None:
            require.positive("replay.capacity_gb", self.capacity_gb)
        self._check_reuse()
        self._check_lags()

    def _check_reuse(self) -> None:
        """Settings about how often a group is trained on that contradict each other."""
        spi = self.samples_per_insert
        if spi is not None:
            require.between("replay.samples_per_insert", spi, 1.0, 1e6)
        if self.sample == "window" and spi is None:
            raise ValueError(
                "replay.sample=window needs replay.samples_per_insert: it decides how many new groups a step waits "
                "for; set it to 2, for example, to train on each group twice on average"
            )
        if self.sample == "fresh" and spi not in (None, 1.0):
            raise ValueError(
                f"replay.samples_per_insert={spi:g} contradicts replay.sample=fresh, which trains on every group once; "
                "set samples_per_insert=null, or sample=mixed"
            )
        if self.max_uses == 1 and self._draws_again:
            raise ValueError(
                f"replay.max_uses=1 lets no group be trained on again, but {self._stale_setting} asks for it; "
                "set max_uses to 2 or more, or sample=fresh"
            )

    def _check_lags(self) -> None:
        """Bounds of the lag that contradict each other."""
        if not self._draws_again:
            needed, key = self.max_lag, "max_lag"
        else:
            if self.max_replay_lag < 1:
                raise ValueError(
                    f"replay.max_replay_lag={self.max_replay_lag} allows no stale group although "
                    f"{self._stale_setting}; set max_replay_lag to 1 or more, or sample=fresh"
                )
            if self.sample == "window" and self.max_replay_lag < self.max_lag:
                raise ValueError(
                    f"replay.max_replay_lag={self.max_replay_lag} is less than replay.max_lag={self.max_lag}: with "
                    "replay.sample=window a new group could leave the window before it was ever in it; "
                    "raise max_replay_lag or lower max_lag"
                )
            needed, key = max((self.max_lag, "max_lag"), (self.max_replay_lag, "max_replay_lag"))
        if self.evict_after_lag is not None and self.evict_after_lag < needed:
            raise ValueError(
                f"replay.evict_after_lag={self.evict_after_lag} would evict groups that replay.{key}={needed} still "
                f"lets be drawn; raise evict_after_lag to {needed} or more, or lower {key}"
            )

    def check_against(
        self, *, groups_per_step: int, minibatches: int, steps: int, checkpoint_every: int, keep_checkpoints: int
    ) -> None:
        """Refuse settings with which this learner would wait forever, or never do what they say. ``ValueError``."""
        num_fresh = self.num_fresh(groups_per_step)
        step = f"learner.groups_per_step={groups_per_step}"
        if num_fresh < 1:
            raise ValueError(
                f"replay.stale_fraction={self.stale_fraction} of {step} leaves no fresh group per step; "
                "lower stale_fraction or raise groups_per_step"
            )
        if self.sample == "window" and num_fresh < minibatches:
            raise ValueError(
                f"learner.minibatches={minibatches} exceeds the {num_fresh} groups that the first step may draw from: "
                f"{step} with replay.samples_per_insert={self.samples_per_insert:g} waits for no more, and a minibatch "
                "needs one at least; lower minibatches or samples_per_insert"
            )
        reuse = groups_per_step / num_fresh
        spi = self.samples_per_insert
        if self.sample != "window" and spi is not None and spi < reuse:
            raise ValueError(
                f"replay.samples_per_insert={spi:g} is less than the {reuse:g} that replay.stale_fraction="
                f"{self.stale_fraction:g} of {step} makes ({num_fresh} fresh groups per step): "
                f"raise it to {reuse:g}, set it to null, or lower stale_fraction"
            )
        if self._draws_again and self.max_uses is not None and self.max_uses < reuse:
            raise ValueError(
                f"replay.max_uses={self.max_uses} is less than the {reuse:g} uses per group that {step} with "
                f"{num_fresh} new groups per step needs: its batches would never be full; raise max_uses, or lower "
                f"{'samples_per_insert' if self.sample == 'window' else 'stale_fraction'}"
            )
        self._check_supply(groups_per_step)
        self._check_capacity(groups_per_step, steps, checkpoint_every, keep_checkpoints)

    def _check_supply(self, groups_per_step: int) -> None:
        """A batch can be full: new groups of ``max_replay_lag`` steps, for `window` also this one's, suffice for it."""
        num_fresh = self.num_fresh(groups_per_step)
        wanted = groups_per_step if self.sample == "window" else self.num_stale(groups_per_step)
        num_steps = self.max_replay_lag + (self.sample == "window")
        if self._draws_again and num_fresh * num_steps < wanted:
            raise ValueError(
                f"replay.max_replay_lag={self.max_replay_lag} lets a step draw from at most {num_fresh * num_steps} "
                f"groups ({num_fresh} new ones per step), fewer than the {wanted} that {self._stale_setting} of "
                f"learner.groups_per_step={groups_per_step} asks for; raise max_replay_lag, or lower "
                f"{'samples_per_insert' if self.sample == 'window' else 'stale_fraction'}"
            )

    def needed_groups(
        self, *, groups_per_step: int, steps: int, checkpoint_every: int, keep_checkpoints: int
    ) -> tuple[int, str]:
        """Most groups whose payloads a run may need at once, and how that number comes about.

        ``F·(max_lag + 1) + groups_per_step · min(steps, checkpoint_every · keep_checkpoints)``. The first term is what
        may wait or be in flight. The second is what was trained on since the oldest checkpoint that is kept, for a run
        may go back to it, with the batch that is being trained on: until the next checkpoint is written and the oldest
        removed, ``checkpoint_every · keep_checkpoints`` steps have passed since that one; without checkpoints on the
        way all steps may have to be gone back.
        """
        num_fresh = self.num_fresh(groups_per_step)
        num_steps = min(steps, checkpoint_every * keep_checkpoints) if checkpoint_every else steps
        formula = f"{num_fresh} new groups × (max_lag={self.max_lag} + 1) + groups_per_step={groups_per_step} × "
        if num_steps == steps:
            formula += f"steps={steps}"
        else:
            formula += f"checkpoint_every={checkpoint_every} × keep_checkpoints={keep_checkpoints}"
        return num_fresh * (self.max_lag + 1) + groups_per_step * num_steps, formula

    def _check_capacity(self, groups_per_step: int, steps: int, checkpoint_every: int, keep_checkpoints: int) -> None:
        needed, formula = self.needed_groups(
            groups_per_step=groups_per_step,
            steps=steps,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
        )
        if self.capacity_groups is not None and self.capacity_groups < needed:
            raise ValueError(
                f"replay.capacity_groups={self.capacity_groups} is less than the {needed} groups that may be needed at "
                f"once ({formula}): with the store full of them no prompt would be handed out, and the learner would "
                f"wait forever; raise it to {needed}, or lower learner.checkpoint_every or learner.keep_checkpoints"
            )

    @property
    def _draws_again(self) -> bool:
        """Whether a batch may hold stale groups."""
        return self.sample == "window" or (self.sample != "fresh" and self.stale_fraction > 0)

    @property
    def _stale_setting(self) -> str:
        """The setting that asks for stale groups."""
        if self.sample == "window":
            return f"replay.sample=window with replay.samples_per_insert={self.samples_per_insert}"
        return f"replay.stale_fraction={self.stale_fraction}"

    @property
    def no_signal_rule(self) -> str:
        """``skip_no_signal`` as it acts: with `window` every draw may be a repeated one, so `stale` means `all`."""
        return "all" if self.sample == "window" and self.skip_no_signal == "stale" else self.skip_no_signal

    @property
    def capacity_bytes(self) -> int | None:
        """``capacity_gb`` in bytes."""
        return None if self.capacity_gb is None else round(self.capacity_gb * GIB)

    def num_fresh(self, groups_per_step: int) -> int:
        """New groups that every step takes out of the queue (F)."""
        if self.sample == "window":
            # Less a rounding: 7 / 1.4 is 5.000000000000001.
            return ceil(groups_per_step / (self.samples_per_insert or 1.0) - 1e-9)
        return groups_per_step - self.num_stale(groups_per_step)

    def num_stale(self, groups_per_step: int) -> int:
        """Stale groups of a full batch: the configured share, rounded to the nearest group; for `window`, the rest."""
        if self.sample == "fresh":
            return 0
        if self.sample == "window":
            return groups_per_step - self.num_fresh(groups_per_step)
        return round(groups_per_step * self.stale_fraction)
