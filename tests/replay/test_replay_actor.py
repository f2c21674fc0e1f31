import asyncio

import pytest

from replay.config import ReplayConfig
from replay.store import ReplayStore
from tests.replay.replay_groups import make_group, same


@pytest.mark.engine
def test_the_service_runs_as_a_ray_actor(tmp_path):
    import ray

    from replay.actor import ReplayActor

    ray.init(num_cpus=1, include_dashboard=False, address="local")
    try:
        config = ReplayConfig(max_lag=0, stale_fraction=0.0)
        options = {"config": config, "num_prompts": 4, "groups_per_step": 2, "steps": 1, "seed": 0}
        actor = ReplayActor.remote(str(tmp_path), **options)
        waiting = actor.sample.remote(step=0, timeout_s=60.0)  # does not keep the calls below from running
        answer = ray.get(actor.lease.remote(worker="r0", version=0, count=2, timeout_s=10.0))
        groups = [make_group(lease.key) for lease in answer.leases]
        assert ray.get([actor.append.remote(group) for group in groups]) == [True, True]
        batch = ray.get(waiting)
        assert all(same(sampled.group, group) for sampled, group in zip(batch.groups, groups, strict=True))
        with pytest.raises(ValueError, match="step 0 was sampled as groups"):
            ray.get(actor.commit.remote(step=0, group_ids=(7,)))
        ray.get(actor.commit.remote(step=0, group_ids=batch.group_ids))
        assert ray.get(actor.lease.remote(worker="r0", version=1, count=1, timeout_s=10.0)).exhausted
        assert ray.get(actor.stats.remote())["version"] == 1
        ray.kill(actor)
    finally:
        ray.shutdown()
    store = asyncio.run(open_when_free(next(tmp_path.glob("*.sqlite3"))))
    assert store.version == 1
    assert store.verify() == []
    store.close()


async def open_when_free(path):
    """The kernel drops the killed actor's lock a moment after ``ray.kill``."""
    from replay.errors import ReplayError

    for _ in range(100):
        try:
            return ReplayStore(path)
        except ReplayError:
            await asyncio.sleep(0.1)
    return ReplayStore(path)
