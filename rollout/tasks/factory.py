"""From the configuration to a task."""

from __future__ import annotations

from rollout.config import TaskConfig
from rollout.tasks.arithmetic import ArithmeticTask
from rollout.tasks.base import Task, resolve_reward
from rollout.tasks.dataset import DatasetTask


def make_task(config: TaskConfig, *, seed: int) -> Task:
    """The task that ``config`` describes. Cheap enough to check a configuration with before anything heavy starts.

    Raises ``ValueError`` naming the setting, or file, line and field, and what to do; also if a reward that the
    configuration names does not exist.
    """
    if config.reward is not None:
        resolve_reward(config.reward)
    if config.name == "arithmetic":
        return ArithmeticTask(config.options, num_eval_prompts=config.eval_prompts, seed=seed)
    return DatasetTask(config)
