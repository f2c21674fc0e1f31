"""Who waits for whom, so that no fresh group is ever trained at a lag above ``max_lag``.

How often groups are trained on needs no rule of its own: F follows from ``samples_per_insert`` or ``stale_fraction``.

Every learner step consumes exactly F fresh groups. A job that is *outstanding* (a prompt in flight under a live lease,
or a usable fresh group that waits in the store) has a due step, the last step that may consume it as fresh:

    due = version + max_lag         version: of the lease while in flight, the oldest token's once it is a group

With s the next step whose batch is still to be chosen, everything outstanding can be trained in time if and only if

    for every t >= s:   #(outstanding with due <= t)  <=  F * (t - s + 1)                                   (feasible)

because steps s..t have room for F*(t - s + 1) groups, and earliest due first never misses a due step that any order
could meet. Two rules keep (feasible) true, and with it the lag within its bound:

* **Lease.** A lease at version v is granted only if (feasible) still holds with it, hence room for
  ``min over t >= v + max_lag of F*(t - s + 1) - #(due <= t)`` of them. At most ``F*(max_lag + 1)`` jobs are ever
  outstanding; ``max_lag = 0`` gives exactly F leases per version: the synchronous algorithm.
* **Sample.** Step s takes the F waiting groups with the earliest due step (ties: id), and only if the rest, leases
  included, is feasible from s + 1 on. Otherwise it waits for a lease in flight to end.

A lease ends in an append (the group's due step is never earlier than the lease's), a release or an expiry (one job
fewer), or a group that cannot train (one job fewer): each keeps (feasible). There is no deadlock while every lease
ends: once none is in flight, F waiting groups always may be taken, and with fewer than F outstanding a lease at any
version >= s - max_lag always fits. A group that arrives after its lease expired is admitted only if it still fits.

Example, F = 2, max_lag = 1, s = 5: steps up to 5 have room for 2, up to 6 for 4. Outstanding: one group of version 4
(due 5) and two leases of version 5 (due 6). A worker at version 5 gets 4 - 3 = 1 lease more; one at version 4 gets
min(2 - 1, 4 - 3) = 1; one at version 3 (due 4 < 5) gets none until it holds newer weights. If two groups of version 5
wait while a lease of version 4 is in flight, step 5 must wait for it: taking both would leave it to step 6, lag 2.

See docs/lag.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Grant:
    """How many leases a worker may have now, and why not more."""

    count: int
    reason: str = ""
    """Empty when all that was asked for was granted."""
    exhausted: bool = False
    """True when the run needs no further prompt, ever."""


@dataclass(frozen=True, kw_only=True)
class LagLimiter:
    """The two rules above. ``waiting`` and ``in_flight`` are versions: oldest tokens', and leases'."""

    max_lag: int
    """Largest lag (steps) of a fresh group when it is trained."""
    num_fresh: int
    """Fresh groups that every step consumes (F)."""
    steps: int
    """Learner steps of the run."""

    def __post_init__(self) -> None:
        assert self.max_lag >= 0, self.max_lag
        assert self.num_fresh >= 1, self.num_fresh

    def room(self, outstanding: Sequence[int], *, version: int, next_step: int) -> int:
        """How many more jobs of ``version`` fit beside ``outstanding`` (versions); 0 or less if none does."""
        due = version + self.max_lag
        dues = sorted(v + self.max_lag for v in outstanding)
        slack = self._capacity(due, next_step) - sum(d <= due for d in dues)
        for rank, later in enumerate(dues, start=1):
            if later > due:  # among equal due steps the last has the largest rank, and is the one that binds
                slack = min(slack, self._capacity(later, next_step) - rank)
        return slack

    def kept(self, outstanding: Sequence[int], *, next_step: int) -> list[bool]:
        """Which jobs can be trained in time, a largest such set: earliest due first, whatever does not fit is left."""
        kept = [False] * len(outstanding)
        count = 0
        for i in sorted(range(len(outstanding)), key=lambda i: outstanding[i]):
            if count < self._capacity(outstanding[i] + self.max_lag, next_step):
                kept[i] = True
                count += 1
        return kept

    def feasible(self, outstanding: Sequence[int], *, next_step: int) -> bool:
        """True if every job (versions) can be trained in time from ``next_step`` on."""
        return all(self.kept(outstanding, next_step=next_step))

    def lacking(self, waiting: Sequence[int], in_flight: Sequence[int], *, next_step: int) -> str:
        """Empty if ``next_step`` may take its batch now; otherwise what it waits for."""
        if len(waiting) < self.num_fresh:
            return (
                f"step {next_step} has {len(waiting)} of {self.num_fresh} fresh groups, "
                f"{len(in_flight)} prompts are in flight"
            )
        rest = sorted(waiting)[self.num_fresh :]
        if self.feasible([*rest, *in_flight], next_step=next_step + 1):
            return ""
        return (
            f"step {next_step} has its {self.num_fresh} fresh groups, but one of {len(in_flight)} prompts in flight "
            f"was leased at version {min(in_flight, default=None)} and would exceed max_lag={self.max_lag} later"
        )

    def grant(
        self,
        *,
        worker: str,
        version: int,
        count: int,
        waiting: Sequence[int],
        in_flight: Sequence[int],
        next_step: int,
    ) -> Grant:
        """Leases for a worker that holds ``version`` and asks for ``count``."""
        needed = self.num_fresh * (self.steps - next_step)
        if len(waiting) >= needed:
            return Grant(count=0, reason=f"the run of {self.steps} steps has all the groups it needs", exhausted=True)
        oldest = next_step - self.max_lag
        if version < oldest:
            return Grant(
                count=0,
                reason=f"worker {worker} holds version {version}, step {next_step} with max_lag={self.max_lag} "
                f"needs at least {oldest}: waiting for its weights",
            )
        if version > next_step:
            return Grant(
                count=0,
                reason=f"worker {worker} holds version {version}, but the learner is at step {next_step}: "
                "its weights belong to a history that was rewound; waiting for its weights",
            )
        left = needed - len(waiting) - len(in_flight)
        fits = self.room([*waiting, *in_flight], version=version, next_step=next_step)
        if min(left, fits) >= count:
            return Grant(count=count)
        if left <= fits:
            reason = f"the groups of all {self.steps} steps wait or are in flight ({len(in_flight)}): waiting for these"
        else:
            reason = (
                f"{len(waiting)} fresh groups wait and {len(in_flight)} prompts are in flight: more of version "
                f"{version} would exceed max_lag={self.max_lag}; waiting for the learner to take step {next_step}"
            )
        return Grant(count=max(min(left, fits), 0), reason=reason)

    def _capacity(self, due: int, next_step: int) -> int:
        """Groups that steps ``next_step..due`` can consume."""
        return self.num_fresh * max(due - next_step + 1, 0)
