"""The Ray shells of the replay store: the same methods, called with ``.remote``.

Ray restarts neither. A second incarnation of the service would know none of the leases that workers still hold; a shard
must be attached again once its file is open. Whoever supervises the run does both.
"""

from __future__ import annotations

from collections.abc import Sequence

import ray

from replay.service import ReplayService
from replay.shard_service import ShardService

ReplayActor = ray.remote(num_cpus=0, max_restarts=0)(ReplayService)
"""`ReplayService` as an asynchronous Ray actor."""


class ShardHost(ShardService):
    """A shard whose payloads and problems are two answers: who awaits the second need not move the first."""

    @ray.method(num_returns=2)
    async def read(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's type
        self, group_ids: Sequence[int]
    ) -> tuple[list[bytes | None], dict[int, str]]:
        """See ``ShardService.read``."""
        return await super().read(group_ids)


ShardActor = ray.remote(num_cpus=0, max_restarts=0)(ShardHost)
"""`ShardService` as an asynchronous Ray actor; its process is called ``ray::ShardHost``."""
