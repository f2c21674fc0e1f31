"""How the groups of one learner step are dealt to its optimiser steps."""

from __future__ import annotations

import numpy as np

from r2vpo.records import Kind, SampledBatch


def split_minibatches(batch: SampledBatch, *, minibatches: int, seed: int) -> list[list[int]]:
    """Indices into ``batch.groups``, one list per minibatch; every index appears once, no list is empty.

    Fresh and stale groups are shuffled apart and dealt one by one, so that any two minibatches differ by at most one
    group, one fresh group and one stale group: a policy that moves on stale groups first learns worse. Which minibatch
    gets a group more is drawn as well. The result depends only on ``seed``, ``batch.step`` and the kinds.

    Raises ``ValueError`` if there are fewer groups than minibatches.
    """
    if len(batch.groups) < minibatches:
        raise ValueError(
            f"the batch of step {batch.step} has {len(batch.groups)} groups, fewer than "
            f"learner.minibatches={minibatches}: a minibatch needs at least one group; "
            "lower learner.minibatches or raise learner.groups_per_step"
        )
    rng = np.random.default_rng([seed, batch.step])
    order: list[int] = []
    for kind in (Kind.FRESH, Kind.STALE):
        indices = [i for i, sampled in enumerate(batch.groups) if sampled.kind == kind]
        order += [indices[j] for j in rng.permutation(len(indices))]
    return [order[m::minibatches] for m in rng.permutation(minibatches)]
