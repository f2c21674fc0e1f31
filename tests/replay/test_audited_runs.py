"""Whole runs in one process whose workers fail and whose shards come and go, resumed twice, then audited."""

import asyncio
import random
from contextlib import suppress

import pytest

from replay.audit import audit_store
from replay.audit_rules import Order, StepSettings
from replay.config import ReplayConfig
from replay.errors import ReplayError
from replay.local import LocalStore
from tests.replay.replay_groups import make_group, unscored_group

NUM_PROMPTS, SEED = 17, 3


class Life:
    """One life of a run: steps ``start`` to ``end`` - 1 of five groups each, three of them fresh."""

    def __init__(self, directory, config, rng, *, start, end, resume, acknowledged):
        self.config, self.rng, self.acknowledged = config, rng, acknowledged
        self.published, self.end, self.start = start, end, start
        self.over = asyncio.Event()
        self.store = LocalStore(
            directory,
            config=config,
            num_prompts=NUM_PROMPTS,
            groups_per_step=5,
            steps=100,
            seed=SEED,
            resume_step=start if resume else None,
        )

    async def run(self):
        await self.store.open()
        workers = [asyncio.create_task(self.generate(f"r{i}")) for i in range(3)]
        shards = asyncio.create_task(self.come_and_go())
        await asyncio.wait_for(self.learn(), timeout=120)
        self.over.set()
        await asyncio.gather(shards, *workers)
        await self.store.close()

    async def learn(self):
        for step in range(self.start, self.end):
            batch = None
            while batch is None:
                with suppress(KeyError, ReplayError):  # a shard went while it was read: the choice is the same then
                    batch = await self.store.sample(step=step, timeout_s=0.05)
            await self.store.commit(step=step, group_ids=batch.group_ids)
            self.published = step + 1
            if self.rng.random() < 0.3:
                await self.store.service.keep_from(step=max(0, step - 8))

    async def generate(self, name):
        held = self.published
        while not self.over.is_set():
            answer = await self.store.lease(worker=name, stamp=(0, held), count=2, timeout_s=0.02)
            await asyncio.gather(*(self.answer(name, lease.key, held) for lease in answer.leases))
            if self.rng.random() < 0.7:
                held = self.published

    async def answer(self, name, key, held):
        fate = self.rng.random()
        if fate < 0.08:
            await self.store.release(worker=name, keys=(key,))
        elif fate >= 0.14:  # else it is forgotten, and its lease expires
            await asyncio.sleep(self.rng.choice([0, 0.003, 0.02]))
            newest = max(held, self.published)
            group = unscored_group(key, version=held) if fate < 0.22 else make_group(key, version=held, newest=newest)
            while key not in self.acknowledged and not self.over.is_set():
                with suppress(KeyError, ReplayError):  # its shard is away
                    await self.store.append(group)
                    self.acknowledged.add(key)
                await asyncio.sleep(0.003)

    async def come_and_go(self):
        while not self.over.is_set():
            await asyncio.sleep(self.rng.random() * 0.03)
            away = self.rng.sample(range(self.config.shards), self.rng.randint(1, self.config.shards))
            for shard in away:
                await self.store.detach(shard)
            await asyncio.sleep(self.rng.random() * 0.02)
            for shard in away:
                await self.store.attach(shard)


@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (0, {"max_lag": 0, "max_replay_lag": 2, "shards": 2}),
        (1, {"max_lag": 3, "max_replay_lag": 4, "shards": 3, "capacity_groups": 200, "skip_no_signal": "all"}),
    ],
)
def test_a_run_whose_shards_come_and_go_holds_through_two_resumes(tmp_path, seed, settings):
    config = ReplayConfig(stale_fraction=0.4, lease_s=0.05, **settings)
    rng, acknowledged = random.Random(seed), set()

    async def live(start, end, resume):
        await Life(tmp_path, config, rng, start=start, end=end, resume=resume, acknowledged=acknowledged).run()

    for start, end in ((0, 7), (5, 12), (12, 16)):
        asyncio.run(live(start, end, resume=start > 0))
    audit = audit_store(
        tmp_path,
        settings=[
            StepSettings(
                first_step=0,
                max_lag=config.max_lag,
                max_replay_lag=config.max_replay_lag,
                min_verdicts=2,
                groups_per_step=5,
                num_fresh=3,
                max_outstanding=3 * (config.max_lag + 1),
                may_evict=config.capacity_groups is not None,
            )
        ],
        resume_step=lambda: 16,
        order=Order(seed=SEED, num_prompts=NUM_PROMPTS),
        acknowledged=acknowledged,
    )
    assert audit.violations == ()
    assert audit.version == 16
    assert audit.num_groups >= len(acknowledged) > 0
