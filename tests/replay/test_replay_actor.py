import pytest

from replay.config import ReplayConfig
from replay.reader import StoreReader
from replay.rows import encode_group
from replay.serialize import decode
from tests.replay.replay_groups import make_group, same


class Wire:
    """Calls an actor; what the job's links do, without deadlines and names."""

    def __init__(self, actor):
        self.actor = actor

    def __getattr__(self, method):
        if method.startswith("__"):
            raise AttributeError(method)
        return lambda *arguments, **settings: self.actor.__getattr__(method).remote(*arguments, **settings)


@pytest.mark.engine
def test_service_and_shard_run_as_ray_actors(tmp_path):
    import ray

    from replay.actor import ReplayActor, ShardActor

    ray.init(num_cpus=1, include_dashboard=False, address="local")
    try:
        config = ReplayConfig(max_lag=0, stale_fraction=0.0)
        options = {"config": config, "num_prompts": 4, "groups_per_step": 2, "steps": 1, "seed": 0}
        service = ReplayActor.remote(str(tmp_path), **options)
        shard = ShardActor.remote(str(tmp_path / "shard-000.sqlite3"), listener=Wire(service))
        ray.get(service.attach.remote(0, Wire(shard)))
        waiting = service.sample.remote(step=0, timeout_s=60.0)  # does not keep the calls below from running
        answer = ray.get(service.lease.remote(worker="r0", stamp=(0, 0), count=2, timeout_s=10.0))
        groups = [make_group(lease.key) for lease in answer.leases]
        assert ray.get([shard.append.remote(encode_group(group)) for group in groups]) == [True, True]
        plan = ray.get(waiting)
        payloads, problems = shard.read.remote(plan.group_ids)
        assert ray.get(problems) == {}
        assert all(same(decode(payload), group) for payload, group in zip(ray.get(payloads), groups, strict=True))
        with pytest.raises(ValueError, match="step 0 was sampled as groups"):
            ray.get(service.commit.remote(step=0, group_ids=(7,)))
        ray.get(service.commit.remote(step=0, group_ids=plan.group_ids))
        assert ray.get(service.lease.remote(worker="r0", stamp=(0, 1), count=1, timeout_s=10.0)).exhausted
        assert ray.get(service.stats.remote())["version"] == 1
        ray.kill(service)
        ray.kill(shard)
    finally:
        ray.shutdown()
    with StoreReader(tmp_path) as reader:
        assert reader.version == 1
        assert list(reader.verify()) == []
