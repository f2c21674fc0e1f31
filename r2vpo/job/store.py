"""The replay room as the driver sees it: the replay actor, its shards, and what becomes of a shard that dies.

    driver ──start, sample, commit──▶ Store ──▶ replay actor   on the driver's node: RUN/replay/consumption.sqlite3
                                        └────▶ shard actors   spread over the nodes: RUN/replay/shard-00i.sqlite3

Each shard stays with its file. One whose process dies is started again on it, since the file has all that was ever
acknowledged; workers and learner wait meanwhile. Without the replay actor, which knows the leases, the run ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol

import ray

from r2vpo.job.component import (
    Component,
    ComponentDied,
    ComponentLost,
    FailedForGood,
    JobFailed,
    together,
    until_stop,
)
from r2vpo.job.links import APPEND_S, SCAN_S, ShardedBatch, ShardLink
from r2vpo.job.restarts import Restarts
from r2vpo.job.status import ComponentStatus
from r2vpo.records import BatchPlan
from replay.rows import by_shard
from replay.schema import shard_file

GOODBYE_S = 10.0
"""Longest wait for each actor's last words when the run ends (seconds)."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A machine of the cluster."""

    id: str
    host: str


class Yard(Protocol):
    """Where shard actors are made."""

    def nodes(self) -> list[Node]:
        """Machines of the cluster, the driver's first."""
        ...

    def launch(self, shard: int, node: Node, *, must_exist: bool) -> Component:
        """The actor of a shard, on its file; it may still fail to open it."""
        ...

    async def find(self, shard: Component) -> None:
        """Wait until a shard has opened its file. ``JobFailed`` if it cannot."""
        ...

    async def end(self, shard: Component) -> None:
        """End its process, also one that hangs: it lets go of the file."""
        ...


class Store:
    """Replay actor and shards as one object. ``watch`` must run as long as the store is used."""

    def __init__(
        self,
        replay: Component,
        yard: Yard,
        *,
        shards: int,
        directory: Path,
        note: Callable[[str], None],
        restarts: Restarts,
        silent_s: float,
    ) -> None:
        """``directory`` is that of the store, on every node; ``note`` takes sentences for a person.

        A shard that does not answer for ``silent_s`` seconds counts as dead.
        """
        self.replay = replay
        """The replay actor."""
        self.num_shards = shards
        self._yard, self._directory, self._note = yard, directory, note
        self._restarts, self._silent_s = restarts, silent_s
        self._since_s = dict.fromkeys(range(shards), time.time())
        self.last_errors: dict[int, str] = {}
        """Why each shard was last started again."""
        self._places: list[Node] = []
        self._actors: list[Component] = []
        self._there: dict[int, Component] = {}  # those attached
        self._changed = asyncio.Condition()

    async def start(self) -> None:
        """Start every shard where its file lies, and let the replay actor know them."""
        hosts = await self.replay.ask("hosts")
        self._places = place_shards(self.num_shards, self._yard.nodes(), hosts, self._directory)
        self._actors = [
            self._yard.launch(shard, node, must_exist=shard in hosts) for shard, node in enumerate(self._places)
        ]
        # All files are open before one counts: what a shard has to say of its own is quickest to see.
        await together(*(self._yard.find(actor) for actor in self._actors))
        await self.replay.ask("set_hosts", {shard: node.host for shard, node in enumerate(self._places)})
        await together(*(self._attach(shard) for shard in range(self.num_shards)))

    async def watch(self) -> NoReturn:
        """Start shards again that have died. ``JobFailed`` if one keeps dying, or cannot be started."""
        await together(*(self._keep(shard) for shard in range(self.num_shards)))
        raise AssertionError("shards are kept until the run ends")

    async def sample(self, *, step: int, timeout_s: float) -> ShardedBatch | None:
        """The batch of ``step``, whole and readable; None if it is not there within about ``timeout_s``.

        A damaged group is set aside, with a note, and the batch drawn again without it.
        """
        plan: BatchPlan | None = await self.replay.ask("sample", step=step, timeout_s=timeout_s)
        if plan is None:
            return None
        batch, problems = await self._read(plan)
        if not problems:
            return batch
        await self.replay.ask("quarantine", step=step, problems=problems)
        for problem in problems.values():
            self._note(f"{problem}; it is set aside, and the batch of step {step} drawn again")
        return None

    async def commit(self, batch: ShardedBatch, *, stop: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Record the batch as consumed; waits as long as the disk is full, but not long once ``stop`` has returned."""
        plan, is_done = batch.plan, False

        async def commit() -> None:
            nonlocal is_done
            await self.replay.ask("commit", step=plan.step, group_ids=plan.group_ids, within_s=APPEND_S)
            is_done = True

        async def patience() -> None:
            await stop()
            await asyncio.sleep(GOODBYE_S)

        await until_stop(commit(), patience)
        if not is_done:
            raise JobFailed(
                f"step {plan.step} was still waiting to be recorded in the replay store when the run was stopped; "
                "--resume goes on from the newest checkpoint"
            )

    async def keep_from(self, step: int) -> None:
        """The run will not be resumed before ``step``."""
        await self.replay.ask("keep_from", step=step)

    async def rewind(self, step: int) -> None:
        """The learner goes on at ``step``: undo what it and later ones consumed, and take all leases back."""
        await self.replay.ask("rewind", step=step, within_s=SCAN_S)

    async def stats(self) -> dict[str, Any]:
        """See ``ReplayService.stats``."""
        return await self.replay.ask("stats")

    def status(self, stats: Mapping[str, Any]) -> list[ComponentStatus]:
        """Every shard; ``stats`` is what `stats` answered last, or nothing of use."""
        said = {shard["shard"]: shard for shard in stats.get("shards", ())}
        return [self._status(shard, said.get(shard, {})) for shard in range(len(self._actors))]

    def _status(self, shard: int, said: Mapping[str, Any]) -> ComponentStatus:
        name = f"replay shard {shard}"
        is_there = shard in self._there
        return ComponentStatus(
            name=name,
            role="shard",
            state="serving" if is_there else "restarting" if shard in self.last_errors else "starting",
            doing=said.get("trouble") or f"{said.get('groups', 0)} groups, {said.get('pending', 0)} being written",
            since_s=self._since_s[shard],
            restarts=self._restarts.count(name),
            last_error=self.last_errors.get(shard, ""),
            node=self._places[shard].host,
            node_id=self._places[shard].id,
        )

    async def close(self) -> None:
        """Close all files; those that do not answer in time are left to the end of Ray."""
        for actors in (self._actors, [self.replay]):  # a shard that writes its last groups tells the replay actor
            await asyncio.gather(*(a.ask("close", within_s=GOODBYE_S) for a in actors), return_exceptions=True)

    async def _read(self, plan: BatchPlan) -> tuple[ShardedBatch, dict[int, str]]:
        """Where the payloads of a batch are, and what is wrong with some."""
        parts = by_shard(plan.group_ids, self.num_shards)
        answers = await together(*(self._read_shard(shard, ids) for shard, ids in parts.items()))
        batch = ShardedBatch(
            plan=plan,
            group_ids=tuple(tuple(ids) for ids in parts.values()),
            payloads=tuple(payloads for payloads, _ in answers),
        )
        return batch, {group_id: problem for _, problems in answers for group_id, problem in problems.items()}

    async def _read_shard(self, shard: int, group_ids: Sequence[int]) -> tuple[ray.ObjectRef, dict[int, str]]:
        dead: Component | None = None
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda known=dead: self._there.get(shard) not in (None, known))
            actor = self._there[shard]
            try:
                return await ShardLink(actor).read(group_ids)
            except ComponentDied:
                dead = actor

    async def _keep(self, shard: int) -> NoReturn:
        while True:
            try:
                await self._actors[shard].watch(silent_s=self._silent_s)
            except ComponentLost as loss:
                await self._bring_back(shard, loss)

    async def _bring_back(self, shard: int, failure: JobFailed) -> None:
        """Start the shard again until it works; raises the failure that came after the last restart allowed."""
        name = f"replay shard {shard}"
        self._there.pop(shard, None)
        self._since_s[shard] = time.time()
        await self.replay.ask("detach", shard, "its process died and is being restarted")
        while True:
            # One that hangs still holds its file.
            await self._yard.end(self._actors[shard])
            try:
                pause_s = self._restarts.begin(name, failure, role="shard", remedy="restarting it on its file")
            except FailedForGood as good:
                file = f"{self._directory / shard_file(shard)} on {self._places[shard].host}"
                raise FailedForGood(f"{good}; its file {file} has all that was stored") from good
            self.last_errors[shard] = str(failure)
            await asyncio.sleep(pause_s)
            began_s = time.monotonic()
            try:
                self._actors[shard] = self._yard.launch(shard, self._places[shard], must_exist=True)
                await self._attach(shard)
            except JobFailed as again:
                failure = again
            else:
                self._note(f"{name} is back after {time.monotonic() - began_s:.1f} s")
                return

    async def _attach(self, shard: int) -> None:
        actor = self._actors[shard]
        await self._yard.find(actor)
        await self.replay.ask("attach", shard, ShardLink(actor), within_s=SCAN_S)
        async with self._changed:
            self._there[shard] = actor
            self._since_s[shard] = time.time()
            self._changed.notify_all()


def place_shards(shards: int, nodes: Sequence[Node], hosts: Mapping[int, str], directory: Path) -> list[Node]:
    """The node of every shard: that of its file, if it has one, else round robin over ``nodes``, the driver's first.

    ``hosts`` says where the files of earlier shards lie (shard → host name). A file that the driver's node sees is
    taken from there whatever the host's name was, since machines are renamed. ``JobFailed`` if one is out of reach.
    """
    places: list[Node] = []
    for shard in range(shards):
        host, file = hosts.get(shard), directory / shard_file(shard)
        there = [node for node in nodes if node.host == host]
        if host is None:
            places.append(nodes[shard % len(nodes)])
        elif there:
            places.append(there[0])
        elif file.exists():
            places.append(nodes[0])
        else:
            raise JobFailed(
                f"replay shard {shard} lies on host {host}, which is not in the Ray cluster (hosts there: "
                f"{', '.join(sorted({node.host for node in nodes}))}); let {host} join it, or bring {file} from there "
                f"to the same place on {nodes[0].host}, with the files {file.name}-* beside it"
            )
    return places
