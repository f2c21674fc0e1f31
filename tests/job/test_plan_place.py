import socket

import pytest

from r2vpo.job.config import ConfigError, ModelConfig, RayConfig, RunConfig
from r2vpo.job.plan_cluster import GIB, Machine, Shape, joined, local, simulated
from r2vpo.job.plan_place import Actors, actors, as_private, place
from rollout.config import RolloutConfig


def shape(*machines: tuple[float, float]) -> Shape:
    """Machines of so many GPUs and CPUs."""
    return Shape(origin="test", machines=tuple(Machine(gpus=g, cpus=c, memory_bytes=GIB) for g, c in machines))


def wanted(name: str, count: int, gpus: float, cpus: float = 1) -> Actors:
    return Actors(name=name, count=count, cpus=cpus, gpus=gpus)


def test_a_cluster_is_described_per_node():
    described = simulated("nodes=2,gpus=8,cpus=96,memory_gb=1000,gpu_memory_gb=80")
    assert len(described.machines) == 2
    assert (described.gpus, described.cpus) == (16, 192)
    assert described.machines[0].memory_bytes == 1000 * GIB
    assert described.gpu_memory_bytes == 80 * GIB
    assert not simulated("cpus=2,memory_gb=8").on_gpu


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("gpu=1", "gpu=1 is none of nodes=…"),
        ("cpus=2", "does not say memory_gb"),
        ("cpus=2,memory_gb=8,gpus=1", "does not say gpu_memory_gb"),
        ("cpus=two,memory_gb=8", "cpus=two must be a number"),
        ("nodes=1.5,cpus=2,memory_gb=8", "nodes=1.5 must be a whole number"),
        ("cpus=-2,memory_gb=8", "cpus=-2 must be 0 or more"),
        ("cpus=nan,memory_gb=8", "cpus=nan must be 0 or more"),
    ],
)
def test_a_description_that_says_too_little_is_refused(text, part):
    with pytest.raises(ValueError, match="--cluster") as caught:
        simulated(text)
    assert part in str(caught.value)


def test_a_ray_cluster_that_is_not_there_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"ray.address={address}: no Ray cluster answers there"):
            joined(RayConfig(address=address))


def test_this_machine_has_cpus_and_memory():
    here = local()
    assert here.cpus >= 1
    assert here.machines[0].memory_bytes > GIB / 4


def test_the_largest_is_placed_first_so_that_small_ones_do_not_take_its_room():
    small, large = wanted("small", 4, gpus=1), wanted("large", 1, gpus=4)
    assert place([small, large], shape((4, 8), (4, 8))) == [{"large": 1}, {"small": 4}]


def test_enough_in_all_is_not_enough_on_one_machine():
    assert place([wanted("engine", 1, gpus=8)], shape((4, 8), (4, 8))) is None
    assert place([wanted("engine", 1, gpus=8)], shape((8, 8))) == [{"engine": 1}]


def test_cpus_bind_as_gpus_do():
    assert place([wanted("rank", 3, gpus=0, cpus=2)], shape((0, 4))) is None
    assert place([wanted("rank", 3, gpus=0, cpus=2)], shape((0, 6))) == [{"rank": 3}]


def test_actors_that_reserve_nothing_go_round_robin():
    assert place([wanted("shard", 3, gpus=0, cpus=0)], shape((0, 1), (0, 1))) == [{"shard": 2}, {"shard": 1}]


def test_a_private_ray_books_the_cpus_that_the_run_reserves():
    config = RunConfig(
        model=ModelConfig(path="m"), rollout=RolloutConfig(workers=3)
    )  # 3 workers and a rank, a CPU each
    assert as_private(shape((0, 2)), config).cpus == 4
    assert as_private(shape((0, 8)), config).cpus == 8


def test_workers_take_a_gpu_per_tensor_parallel_rank_where_there_are_gpus():
    config = RunConfig(model=ModelConfig(path="m"), rollout=RolloutConfig(workers=2, tensor_parallel_size=4))
    by_name = {kind.name: kind for kind in actors(config, on_gpu=True)}
    assert by_name["rollout worker"].all_gpus == 8
    assert by_name["learner rank"].all_gpus == 1
    assert sum(kind.all_gpus for kind in actors(config, on_gpu=False)) == 0


def test_every_pool_asks_for_what_is_its_own():
    config = RunConfig(
        model=ModelConfig(path="m"),
        rollout=RolloutConfig(
            workers=5,
            num_cpus=2,
            pools={"large": {"workers": 1, "tensor_parallel_size": 4}, "small": {"workers": 4, "num_cpus": 1}},
        ),
    )
    large, small, *_ = actors(config, on_gpu=True)
    assert (large.name, large.count, large.gpus, large.cpus) == ("rollout worker large", 1, 4, 2)
    assert (small.name, small.count, small.gpus, small.cpus) == ("rollout worker small", 4, 1, 1)
    assert config.reserved_cpus == 1 * 2 + 4 * 1 + 1  # and a learner rank
    assert config.rollout.engine_gpus == (4, 1, 1, 1, 1)
