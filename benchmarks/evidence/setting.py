"""One run of a comparison, as a value: everything its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.checks import require

TASKS = ("addition4", "addition8", "sorting10")
SIZES = ("0.1M", "0.4M", "1.6M")
PRIORITIES = ("uniform", "advantage", "age", "uses")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run; two settings with one `id` give bit-identical results on one machine with one thread."""

    task: str = "addition4"
    """`addition4`, `addition8` or `sorting10`; see `tasks`."""
    size: str = "0.1M"
    """Model size in parameters; see `model`."""
    seed: int = 0
    """Of the start weights, prompts, sampled answers, draws from the replay list and minibatches."""
    iterations: int = 90
    """Learner steps, each of 32 × 8 rollouts."""
    reuse: int = 1
    """Learner steps that train on a group on average: a batch is the 32 fresh groups and (reuse - 1) × 32 stale ones,
    or as many as there are."""
    max_age: int = 4
    """Largest age of a stale group (learner steps since it was fresh)."""
    priority: str = "uniform"
    """Chances of stale groups: equal, or as `replay.priority` at exponent 1, with the importance weight of the draw."""
    passes: int = 1
    """Passes over the batch in one learner step, unless the budget ends it earlier (`end_early`)."""
    minibatches: int = 4
    """Optimiser steps in one pass."""
    lag: int = 0
    """Learner steps by which the weights that sample are behind the learner's."""
    lr: float = 3e-4
    """Nominal learning rate of AdamW."""
    flip: float = 0.0
    """Chance with which the reward that the learner sees of an answer is turned over."""
    skip_no_signal: bool = False
    """Leave fresh groups without signal out of the passes, and of V; the loss is still divided as if they were there. A
    shortcut that changes nothing where V is only logged: for objectives without λ, step control and early end."""
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `AlgorithmConfig` that differ from its defaults."""

    def __post_init__(self) -> None:
        require.one_of("task", self.task, TASKS)
        require.one_of("size", self.size, SIZES)
        require.one_of("priority", self.priority, PRIORITIES)
        for name in ("iterations", "reuse", "max_age", "passes", "minibatches"):
            require.at_least(name, getattr(self, name), 1)
        require.at_least("lag", self.lag, 0)
        require.positive("lr", self.lr)
        require.between("flip", self.flip, 0.0, 1.0)
        self.algorithm_config()

    @property
    def id(self) -> str:
        """A name that depends on every value, also on those of the algorithm that are left at their defaults."""
        text = json.dumps({**asdict(self), "algorithm": asdict(self.algorithm_config())}, sort_keys=True)
        return f"{self.task}-{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    def algorithm_config(self) -> AlgorithmConfig:
        """The settings of the algorithm room. ``ValueError`` or ``TypeError`` if they are not valid."""
        return AlgorithmConfig(**self.algorithm)

    def to_json(self) -> dict[str, Any]:
        """The values that differ from the defaults, as JSON; `from_json` gives an equal setting."""
        default = _DEFAULTS
        return {name: value for name, value in asdict(self).items() if value != default[name]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Setting:
        """A setting from some of its values. ``ValueError`` for a name that is none of its fields."""
        names = {f.name for f in fields(cls)}
        if unknown := values.keys() - names:
            raise ValueError(f"{sorted(unknown)} are no fields of a setting; it has {sorted(names)}")
        return cls(**values)


_DEFAULTS = asdict(Setting())
