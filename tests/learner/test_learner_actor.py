import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from learner.checkpoint import newest
from learner.config import LearnerConfig
from r2vpo.algorithm.config import AlgorithmConfig
from r2vpo.checksum import verify_bucket
from r2vpo.records import Buckets, BucketSpec, SampledBatch
from tests.learner.batches import sampled_batches


@dataclasses.dataclass(frozen=True)
class Fetched:
    """BatchSource of a batch that is here already."""

    batch: SampledBatch

    def fetch(self) -> SampledBatch:
        return self.batch


class Announced:
    """A sender that keeps nothing, and writes down what it is given once a version is announced."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, -1

    def open(self, *, rank: int, address: tuple[str, int]) -> None:
        self.rank = rank

    def put(self, payload: memoryview) -> None:
        pass

    def send(self, buckets: Buckets, specs: Sequence[BucketSpec]) -> None:
        if self.rank == 0:
            for bucket, spec in zip(buckets, specs, strict=True):
                assert bucket is not None
                assert bucket[0] == spec
                verify_bucket(bucket[1], spec)
            text = f"{len(specs)} buckets as announced"
        else:
            assert not specs
            text = f"{sum(bucket is None for bucket in buckets)} gatherings"
        (self.folder / f"sent-{self.rank}").write_text(text)


@pytest.mark.engine
def test_two_ranks_train_publish_and_save_as_ray_actors(tmp_path):
    import ray

    from learner.actor import BoardActor, LearnerActor

    batches = sampled_batches(tmp_path / "model", steps=1)
    config = LearnerConfig(ranks=2, groups_per_step=6, minibatches=2, lr=1e-3, zero_stage=3, step_timeout_s=120.0)
    settings = {
        "config": config,
        "algorithm": AlgorithmConfig(),
        "model_path": str(tmp_path / "model"),
        "temperature": 1.0,
        "max_lag": 2,
        "max_replay_lag": 4,
        "exact_engine": True,
        "seed": 0,
    }
    ray.init(num_cpus=2, include_dashboard=False, address="local")
    try:
        environment = {"env_vars": {"OMP_NUM_THREADS": "1"}}
        make = LearnerActor.options(num_cpus=0, runtime_env=environment)
        ranks = [make.remote(rank, 2, **settings) for rank in range(2)]
        _, port = ray.get(ranks[0].address.remote())
        infos = ray.get([rank.start.remote("127.0.0.1", port) for rank in ranks], timeout=180)
        assert infos[0]["dtype"] == "float32"
        assert infos[0]["num_parameters"] == infos[1]["num_parameters"] > 10_000

        board = BoardActor.remote()
        waiting = board.newest.remote((0, 0), 120.0)
        steps = [rank.train_step.remote(Fetched(batches[0])) for rank in ranks]
        assert ray.get(ranks[0].ping.remote())["rank"] == 0  # answers beside the step
        metrics = ray.get(steps)
        assert metrics[0]["step/loss"] == metrics[1]["step/loss"]
        assert "time/fetch_s" in metrics[0]
        published = ray.get([rank.publish.remote() for rank in ranks])
        assert published[1] is None
        manifest, references = published[0]
        assert manifest.version == 1
        ray.get(board.post.remote(manifest, references))
        assert ray.get(waiting) == manifest
        payloads = ray.get(list(ray.get(board.references.remote((0, 1)))))
        for payload, spec in zip(payloads, manifest.buckets, strict=True):
            assert payload.dtype == np.uint8
            verify_bucket(memoryview(payload), spec)

        ray.get([rank.open.remote(Announced(tmp_path)) for rank in ranks])
        (announced, kept), _ = ray.get([rank.publish.remote() for rank in ranks])
        assert (announced.buckets, kept) == (manifest.buckets, [])
        ray.get([rank.send.remote() for rank in ranks])
        assert (tmp_path / "sent-0").read_text() == f"{len(manifest.buckets)} buckets as announced"
        assert (tmp_path / "sent-1").read_text() == f"{len(manifest.buckets)} gatherings"

        ray.get([rank.save.remote(str(tmp_path / "checkpoints")) for rank in ranks])
        (tmp_path / "mine").mkdir()
        with pytest.raises(ValueError, match="mine exists and is no model"):
            ray.get([rank.export.remote(str(tmp_path / "mine")) for rank in ranks])
        for leftover in ("old", ""):  # the second takes the place of the first
            ray.get([rank.export.remote(str(tmp_path / "exported")) for rank in ranks])
            assert (tmp_path / "exported" / "config.json").is_file()
            assert not (tmp_path / "exported" / "old").exists()
            (tmp_path / "exported" / leftover).mkdir(exist_ok=True)
        assert [path.name for path in tmp_path.glob("exported*")] == ["exported"]
        path = newest(tmp_path / "checkpoints")
        assert path.name == "step-000001"
        for rank in ranks:
            ray.kill(rank)
        lonely = make.remote(0, 1, **settings | {"config": dataclasses.replace(config, ranks=1)})
        ray.get(lonely.start.remote("127.0.0.1", ray.get(lonely.address.remote())[1]), timeout=180)
        with pytest.raises(ValueError, match=r"learner\.ranks=1, but the checkpoint was written with 2"):
            ray.get(lonely.load.remote(str(path)))
    finally:
        ray.shutdown()


def test_placing_the_actors_loads_neither_torch_nor_deepspeed():
    import subprocess
    import sys

    code = (
        "import sys, learner.actor, learner.checkpoint; print({'torch', 'deepspeed', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
