"""Where the actors of the replay room are made: pinned to the node whose disk holds their file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r2vpo.job.component import Component, JobFailed
from r2vpo.job.config import RunConfig
from r2vpo.job.links import SCAN_S, ListenerLink
from r2vpo.job.processes import Families
from r2vpo.job.restarts import Restarts
from r2vpo.job.store import Node, Store
from replay.actor import ReplayActor, ShardActor
from replay.schema import shard_file
from rollout.tasks.factory import make_task


class RayYard:
    """Shard actors on the nodes of the Ray cluster that this process is connected to."""

    def __init__(self, replay: Component, *, shards: int, directory: Path) -> None:
        self._replay, self._num_shards, self._directory = replay, shards, directory
        self._families = Families()

    def nodes(self) -> list[Node]:
        """Those alive."""
        here = ray.get_runtime_context().get_node_id()
        alive = [Node(id=node["NodeID"], host=node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"]]
        return sorted(alive, key=lambda node: (node.id != here, node.host, node.id))

    def launch(self, shard: int, node: Node, *, must_exist: bool) -> Component:
        """See ``Yard.launch``. ``JobFailed`` if the node has left the cluster."""
        file = self._directory / shard_file(shard)
        if node not in self.nodes():
            raise JobFailed(f"replay shard {shard}: host {node.host} with its file {file} has left the Ray cluster")
        actor = ShardActor.options(scheduling_strategy=_pinned(node.id)).remote(
            str(file),
            shard=shard,
            shards=self._num_shards,
            must_exist=must_exist,
            listener=ListenerLink(self._replay),
        )
        return Component(name=f"replay shard {shard}", actor=actor)

    async def find(self, shard: Component) -> None:
        """See ``Yard.find``."""
        await self._families.find(shard, within_s=SCAN_S)

    async def end(self, shard: Component) -> None:
        """See ``Yard.end``."""
        await self._families.end(shard)


def make_store(
    config: RunConfig, directory: Path, *, resume_step: int | None, note: Callable[[str], None], restarts: Restarts
) -> Store:
    """The store of a run below ``directory``, a disk of this node; none of its actors works yet."""
    actor = ReplayActor.options(scheduling_strategy=_pinned(ray.get_runtime_context().get_node_id())).remote(
        str(directory),
        config=config.replay,
        num_prompts=make_task(config.task, seed=config.seed).num_prompts,
        groups_per_step=config.learner.groups_per_step,
        steps=config.learner.steps,
        seed=config.seed,
        resume_step=resume_step,
    )
    replay = Component(name="replay store", actor=actor)
    shards = config.replay.shards
    yard = RayYard(replay, shards=shards, directory=directory)
    return Store(
        replay,
        yard,
        shards=shards,
        directory=directory,
        note=note,
        restarts=restarts,
        silent_s=config.supervisor.silent_s,
    )


def _pinned(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)
