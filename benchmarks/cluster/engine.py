"""A cold start of one engine of a recipe: from a new Python process to its first token, without Ray.

    python -m benchmarks.cluster.engine CONFIG

Whoever starts it measures the time until it prints ``served``; that is what a new rollout worker is held against.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from r2vpo.job.config import RunConfig, load_config
from rollout.environment import engine_environment

PROBE_S = 120.0
"""Longest wait for the token (seconds)."""


async def serve(config: RunConfig) -> None:
    from rollout.engine import RolloutEngine  # after the environment is set

    engine = await RolloutEngine.start(
        config.rollout,
        model_path=config.model.path,
        on_gpu=False,
        trust_remote_code=False,
        transport=config.learner.weight_transport,
    )
    await engine.probe(PROBE_S)
    print("served", flush=True)
    engine.shutdown()


if __name__ == "__main__":
    the_config = load_config(Path(sys.argv[1]))
    os.environ |= engine_environment(the_config.rollout, on_gpu=False)
    asyncio.run(serve(the_config))
