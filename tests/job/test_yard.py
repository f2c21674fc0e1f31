"""The replay room on a real Ray cluster of two nodes: every shard on its own, and batches put together from both."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from r2vpo.job.component import Component, cancelled
from r2vpo.job.config import ModelConfig, RunConfig
from r2vpo.job.errorlog import ErrorLog
from r2vpo.job.links import ReplayLink
from r2vpo.job.restarts import Restarts
from r2vpo.job.yard import make_store
from r2vpo.records import Kind
from replay.config import ReplayConfig
from replay.rows import shard_of_key
from tests.replay.replay_groups import make_group, same

pytestmark = pytest.mark.engine


@pytest.fixture
def nodes():
    """Ids of two Ray nodes, the driver's first."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, namespace="r2vpo", log_to_driver=False)
    yield [cluster.head_node.node_id, other.node_id]
    ray.shutdown()
    cluster.shutdown()


def node_of(component: Component) -> str:
    return ray.get(component.actor.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()))


async def test_two_shards_on_two_nodes_take_groups_and_give_a_batch_also_after_one_was_killed(nodes, tmp_path: Path):
    config = RunConfig(model=ModelConfig(path="m"), replay=ReplayConfig(shards=2, max_lag=0, stale_fraction=0.0))
    notes: list[str] = []
    restarts = Restarts(config.supervisor, note=notes.append, errors=ErrorLog(tmp_path / "error.log"))
    store = make_store(config, tmp_path, resume_step=None, note=notes.append, restarts=restarts)
    await store.start()
    watching = asyncio.create_task(store.watch())
    actors = store._actors
    assert [node_of(actor) for actor in actors] == nodes
    assert node_of(store.replay) == nodes[0]

    link = ReplayLink(store.replay, shards=2)
    answer = await link.lease(worker="r0", stamp=(0, 0), count=32, timeout_s=10)
    groups = {lease.key: make_group(lease.key) for lease in answer.leases}
    half = len(groups) // 2
    assert all(await asyncio.gather(*(link.append(group) for group in [*groups.values()][:half])))
    ray.kill(actors[1].actor)
    # Not `all`: one that was written just before the kill answers False, its key was there already.
    await asyncio.gather(*(link.append(group) for group in [*groups.values()][half:]))
    assert notes[0].startswith("replay shard 1 died; restarting it on its file (1 of 3")

    batch = await store.sample(step=0, timeout_s=10)
    assert batch is not None
    fetched = batch.fetch()
    assert {sampled.group.key for sampled in fetched.groups} == set(groups)
    assert {shard_of_key(key, 2) for key in groups} == {0, 1}
    assert all(
        sampled.kind == Kind.FRESH and same(sampled.group, groups[sampled.group.key]) for sampled in fetched.groups
    )
    await store.commit(batch, stop=asyncio.Event().wait)
    stats = await store.stats()
    assert (stats["version"], stats["groups"], stats["uses"]["fresh"]) == (1, 32, 32)
    await cancelled(watching)
    await store.close()

    again = make_store(config, tmp_path, resume_step=1, note=notes.append, restarts=restarts)
    await again.start()
    assert (await again.stats())["groups"] == 32
    await again.close()
