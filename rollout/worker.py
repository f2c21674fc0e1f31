"""A rollout worker: leases prompts, generates and scores their groups, appends them, and keeps its weights new.

    PromptSource ──lease──▶ lease loop ──▶ group task × groups_in_flight ──append──▶ GroupSink
                                               │ engine.generate, rewards
    WeightSource ──newest, fetch──▶ sync loop ─┴─ pause, load, resume, canary

Plain asyncio: engine, rewards and the three sources are given, so that a test can pass others. A failed trajectory is
data and becomes an outcome; a failed component (engine, reward pool, store) raises out of ``run()``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from r2vpo.records import (
    Evaluation,
    GroupSink,
    Lease,
    LeaseAnswer,
    PromptSource,
    RolloutStats,
    Stamp,
    WeightSource,
)
from rollout.config import RolloutConfig
from rollout.generation import Engine, request_seed
from rollout.groups import failed_group, scored_group, sound_verdicts
from rollout.rewards import RewardPool, Verdict
from rollout.sync import WeightSync
from rollout.tasks.base import Task, TaskPrompt

ASK_S = 5.0
"""Longest single wait for a lease or a manifest (seconds); the loops ask again, so it bounds only one call."""
SUPERSEDED_S = 0.5
"""Before the next question for weights that were gone when they were fetched (seconds)."""
LET_GO_S = 5.0
"""Longest wait for cancelled work to end (seconds)."""
REASONS = 50
"""Different reasons for missing rewards that a worker writes down."""

logger = logging.getLogger(__name__)

Tokenize = Callable[[str], list[int]]
"""Text of a prompt to token ids, chat template included."""


class RolloutWorker:
    """One engine's worth of rollouts. ``run()`` works until ``stop()``."""

    def __init__(
        self,
        name: str,
        *,
        config: RolloutConfig,
        seed: int,
        engine: Engine,
        task: Task,
        tokenize: Tokenize,
        rewards: RewardPool,
        prompts: PromptSource,
        groups: GroupSink,
        weights: WeightSource,
        sync: WeightSync,
        probe_every_s: float = 30.0,
        silent_s: float = 120.0,
    ) -> None:
        """The engine must generate a token within ``silent_s`` seconds whenever it is asked, all ``probe_every_s``."""
        self.name = name
        self._config = config
        self._seed = seed
        self._engine = engine
        self._task = task
        self._tokenize = tokenize
        self._rewards = rewards
        self._prompts = prompts
        self._groups = groups
        self._weights = weights
        self._sync = sync
        self._probe_every_s, self._silent_s = probe_every_s, silent_s
        self._stopping, self._draining = asyncio.Event(), asyncio.Event()
        self._tasks: dict[asyncio.Task[None], Lease] = {}
        self._waits_for = "the first weights"
        self._num_groups = self._num_trajectories = self._num_tokens = 0
        self._clock = BusyClock()
        self._said: set[str] = set()

    async def run(self) -> None:
        """Serve until stopped or drained; raises what a component raised.

        All accepted leases have gone back when it returns.
        """
        works = (
            self._sync_loop(),
            self._lease_loop(),
            self._probe_loop(),
            self._engine.watch(),
            self._stopping.wait(),
        )
        waits = [asyncio.create_task(work) for work in works]
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not self._stopping.is_set():  # whoever stops a worker may have ended its engine already
                for wait in done:
                    wait.result()
        finally:
            await _let_go(waits)
            await self._discard_in_flight()
            self._waits_for = "nothing: it has stopped"

    def stop(self) -> None:
        """Take no further lease, return those in flight, and let ``run()`` end."""
        self._stopping.set()

    def drain(self) -> None:
        """Take no further lease, finish the groups in flight, and then let ``run()`` end."""
        self._draining.set()

    async def evaluate(self, *, version: int, num_prompts: int, timeout_s: float) -> Evaluation:
        """Mean reward on the first ``num_prompts`` held-out prompts once the engine holds ``version``, and on all sets.

        Responses without a verdict are left out of the mean. ``TimeoutError`` if the version does not arrive in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._sync.reached(version)
        except TimeoutError:
            raise TimeoutError(
                f"version {version} of the weights did not arrive within {timeout_s:g} s; "
                f"{self.name} holds version {self._sync.version}"
            ) from None
        prompts = [self._task.eval_prompt(i) for i in range(min(num_prompts, self._task.num_eval_prompts))]
        sets = {name: await self._score(held, f"eval.{name}") for name, held in self._task.eval_sets.items()}
        return replace(await self._score(prompts, "eval"), sets=sets)

    async def _score(self, prompts: Sequence[TaskPrompt], name: str) -> Evaluation:
        """Sampled and greedy responses to ``prompts``; ``name`` and a prompt's position give its seed."""
        sampled = await self._mean_reward(prompts, name, temperature=self._config.temperature)
        greedy = await self._mean_reward(prompts, name, temperature=0.0)
        return Evaluation(
            version=self._sync.version, accuracy=sampled[0], greedy_accuracy=greedy[0], num_prompts=sampled[1]
        )

    def stats(self) -> RolloutStats:
        """What this worker did since its first verified sync; each sync is reported once."""
        busy_s, alive_s = self._clock.read()
        return RolloutStats(
            worker=self.name,
            version=self._sync.version,
            groups=self._num_groups,
            trajectories=self._num_trajectories,
            tokens=self._num_tokens,
            busy_s=busy_s,
            alive_s=alive_s,
            in_flight=len(self._tasks),
            waits_for=self._waits_for,
            new_syncs=self._sync.take_records(),
        )

    async def _sync_loop(self) -> None:
        """Consumes manifests; waits for the next version; unblocked by the learner's publication; produces new weights.

        While a version is loaded and not yet proven by the canary, no lease is taken and no group is appended. A
        canary that fails discards all groups in flight: some of their tokens came from weights that have no name. So
        does a new lineage: their tokens came from weights that the learner has gone back behind.
        """
        while True:
            manifest = await self._weights.newest(after=self._sync.stamp, timeout_s=ASK_S)
            if manifest is None:
                continue
            started_s = time.monotonic()
            try:
                payloads = await self._weights.fetch(manifest)
            except LookupError:  # superseded while we asked, or the learner has died: another manifest will come
                await asyncio.sleep(SUPERSEDED_S)
                continue
            if manifest.lineage != self._sync.stamp[0]:
                await self._discard_in_flight()
            await self._sync.apply(manifest, payloads, started_s=started_s, on_mismatch=self._discard_in_flight)

    async def _lease_loop(self) -> None:
        """Consumes leases; waits for a free slot, proven weights and the limiter; produces group tasks.

        Unblocked by a finished group, by the sync loop, and by the learner's commits. An ask that still waits when new
        weights arrive is asked again under the new version; the store then answers the old one at once. Ends once it
        is drained; a lease that the store grants at that moment is taken back from a worker that has ended.
        """
        asks: dict[asyncio.Task[None], Stamp] = {}
        drained = asyncio.create_task(self._draining.wait())
        try:
            while not drained.done():
                await self._sync.proven()
                self._clock.start()
                stamp = self._sync.stamp
                free = self._config.groups_in_flight - len(self._tasks)
                if free > 0 and stamp not in asks.values():
                    asks[asyncio.create_task(self._ask(stamp, free))] = stamp
                newer = asyncio.create_task(self._sync.newer(stamp))
                try:
                    waits = {newer, drained, *asks, *self._tasks}
                    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    newer.cancel()
                self._reap()
                for ask in [a for a in asks if a.done()]:
                    del asks[ask]
                    ask.result()
        finally:
            for wait in (drained, *asks):
                wait.cancel()
        self._waits_for = "the end of its last groups"
        while self._tasks:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
            self._reap()

    async def _probe_loop(self) -> None:
        """Waits for time to pass; consumes a token of the engine; produces nothing but ``EngineFailed``."""
        while True:
            await asyncio.sleep(self._probe_every_s)
            await self._engine.probe(self._silent_s)

    async def _ask(self, stamp: Stamp, count: int) -> None:
        """One question to the ledger. One that found the job complete lasts, lest it be repeated without a pause."""
        answer = await self._prompts.lease(worker=self.name, stamp=stamp, count=count, timeout_s=ASK_S)
        if stamp[0] != self._sync.stamp[0]:  # the learner went back meanwhile, and the store took the leases back
            return
        self._accept(answer)
        if answer.exhausted:
            await asyncio.sleep(ASK_S)

    def _accept(self, answer: LeaseAnswer) -> None:
        """Start a group task for every lease of an answer."""
        self._waits_for = "nothing: the job needs no further prompt" if answer.exhausted else answer.reason
        for lease in answer.leases:
            self._tasks[asyncio.create_task(self._generate(lease))] = lease
        self._clock.set_busy(bool(self._tasks))

    async def _generate(self, lease: Lease) -> None:
        """From lease to append. A prompt that the engine refuses becomes a group of errors, and is not asked again."""
        prompt = self._task.prompt(lease.index)
        token_ids = self._tokenize(prompt.text)
        await self._sync.proven()  # the lease may be the answer to a question from before the load
        try:
            completions = await self._engine.generate(
                token_ids,
                n=self._config.group_size,
                seed=request_seed(self._seed, lease.key),
                temperature=self._config.temperature,
                max_tokens=self._config.max_tokens,
            )
        except ValueError as error:
            group = failed_group(lease, prompt, token_ids, size=self._config.group_size, worker=self.name, error=error)
        else:
            scored = await self._rewards.score([(c.text, prompt.truth) for c in completions])
            verdicts = sound_verdicts(completions, scored)
            self._say_why(verdicts)
            group = scored_group(lease, prompt, token_ids, completions, verdicts, worker=self.name)
        await self._sync.proven()
        is_new = await self._groups.append(group)
        logger.debug("acknowledged %s", group.key)
        if is_new:
            self._num_groups += 1
            self._num_trajectories += len(group.trajectories)
            self._num_tokens += group.num_sampled_tokens

    def _say_why(self, verdicts: Sequence[Verdict]) -> None:
        """Write every reason for a missing reward to the log, once, up to a point: the store keeps only outcomes."""
        for verdict in verdicts:
            if verdict.error and verdict.error not in self._said and len(self._said) < REASONS:
                self._said.add(verdict.error)
                logger.warning("no reward (%s): %s", verdict.outcome.value, verdict.error)

    def _reap(self) -> None:
        """Forget finished group tasks and raise what one of them raised; the lease of that one still goes back."""
        for task in [t for t in self._tasks if t.done()]:
            if not task.cancelled():
                task.result()
            del self._tasks[task]
        self._clock.set_busy(bool(self._tasks))

    async def _discard_in_flight(self) -> None:
        """Cancel every group task and give its prompt back."""
        tasks, self._tasks = self._tasks, {}
        await _let_go(tasks)
        self._clock.set_busy(False)
        if tasks:
            await self._prompts.release(worker=self.name, keys=tuple(lease.key for lease in tasks.values()))

    async def _mean_reward(self, prompts: Sequence[TaskPrompt], name: str, *, temperature: float) -> tuple[float, int]:
        """Mean reward and number of verdicts over ``prompts``, one response each."""
        slots = asyncio.Semaphore(self._config.groups_in_flight * self._config.group_size)

        async def one(index: int, prompt: TaskPrompt) -> float | None:
            async with slots:
                try:
                    [completion] = await self._engine.generate(
                        self._tokenize(prompt.text),
                        n=1,
                        seed=request_seed(self._seed, f"{name}.{index}"),
                        temperature=temperature,
                        max_tokens=self._config.max_tokens,
                    )
                except ValueError:
                    return None  # the engine refuses the prompt: no verdict
            [verdict] = await self._rewards.score([(completion.text, prompt.truth)])
            return verdict.reward

        scored = await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(prompts)))
        rewards = [reward for reward in scored if reward is not None]
        return (sum(rewards) / len(rewards) if rewards else float("nan")), len(rewards)


async def _let_go(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel all, and wait until they have ended, but not for long.

    Whoever is cancelled in the middle of a load first asks the engine to resume, and one that is stopped never answers.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        done, _ = await asyncio.wait(tasks, timeout=LET_GO_S)
        for task in done:
            if not task.cancelled():
                task.exception()  # nobody asks for it any more


class BusyClock:
    """Seconds spent with work in flight, and seconds altogether, since ``start()``."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._started_s: float | None = None
        self._busy_since_s: float | None = None
        self._busy_s = 0.0

    def start(self) -> None:
        """Begin to count; later calls change nothing."""
        if self._started_s is None:
            self._started_s = self._now()

    def set_busy(self, busy: bool) -> None:
        """Say whether work is in flight from now on."""
        if busy and self._busy_since_s is None:
            self._busy_since_s = self._now()
        if not busy and self._busy_since_s is not None:
            self._busy_s += self._now() - self._busy_since_s
            self._busy_since_s = None

    def read(self) -> tuple[float, float]:
        """``(busy, altogether)`` in seconds."""
        now_s = self._now()
        busy_s = self._busy_s + (now_s - self._busy_since_s if self._busy_since_s is not None else 0.0)
        return busy_s, (now_s - self._started_s if self._started_s is not None else 0.0)
