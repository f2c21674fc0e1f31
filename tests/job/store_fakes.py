"""The replay room without Ray: a replay actor and shards whose files outlive them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from r2vpo.job.component import Component
from r2vpo.job.config import SupervisorConfig
from r2vpo.job.errorlog import ErrorLog
from r2vpo.job.links import ShardLink
from r2vpo.job.restarts import Restarts
from r2vpo.job.store import Node, Store
from r2vpo.records import BatchPlan, Draw, Kind
from replay.rows import EncodedGroup
from tests.job.fakes import Actor, Served

MAX_RESTARTS, WINDOW_S = 3, 600.0
HERE = Node(id="n0", host="here")
THERE = Node(id="n1", host="there")


class FakeShard:
    """Appends to and reads from ``file``, key → payload; ``hold`` keeps appends from being answered."""

    def __init__(self, file: dict[str, bytes], damaged: dict[int, str] | None = None) -> None:
        self.file, self.damaged = file, {} if damaged is None else damaged
        self.hold: asyncio.Event | None = None

    async def append(self, group: EncodedGroup) -> bool:
        is_new = group.key not in self.file
        self.file[group.key] = group.payload
        if self.hold is not None:
            await self.hold.wait()
        return is_new

    async def read(self, group_ids: list[int]) -> tuple[list[bytes], dict[int, str]]:
        return [f"payload {i}".encode() for i in group_ids], {
            i: self.damaged[i] for i in group_ids if i in self.damaged
        }

    async def close(self) -> None: ...


class FakeReplay:
    """What of `ReplayService` the driver and the links call. ``plans`` are the batches it hands out, in turn."""

    def __init__(self, shards: int) -> None:
        self.links: list[tuple[int, ShardLink | None]] = [(0, None)] * shards
        self.known_hosts: dict[int, str] = {}
        self.plans: list[BatchPlan] = []
        self.heard: list[tuple[Any, ...]] = []
        self.has_room = asyncio.Event()
        self._changed = asyncio.Condition()

    async def hosts(self) -> dict[int, str]:
        return self.known_hosts

    async def set_hosts(self, hosts: dict[int, str]) -> None:
        self.known_hosts = hosts

    async def attach(self, shard: int, link: ShardLink) -> None:
        async with self._changed:
            self.links[shard] = (self.links[shard][0] + 1, link)
            self._changed.notify_all()
        self.heard.append(("attach", shard))

    async def detach(self, shard: int, reason: str) -> None:
        self.links[shard] = (self.links[shard][0], None)
        self.heard.append(("detach", shard))

    async def locate(self, shard: int, *, after: int, timeout_s: float) -> tuple[int, ShardLink | None]:
        async with self._changed:
            await self._changed.wait_for(lambda: self.links[shard][1] is not None and self.links[shard][0] > after)
        return self.links[shard]

    async def sample(self, *, step: int, timeout_s: float) -> BatchPlan | None:
        return self.plans[0] if self.plans else None

    async def quarantine(self, *, step: int, problems: dict[int, str]) -> None:
        self.plans.pop(0)
        self.heard.append(("quarantine", step, problems))

    async def commit(self, *, step: int, group_ids: tuple[int, ...]) -> None:
        await self.has_room.wait()
        self.heard.append(("commit", step, group_ids))

    async def close(self) -> None: ...


class FakeYard:
    """Makes shard actors; those in ``broken`` (an error per launch, None for a good one) fail to open their file."""

    def __init__(self, *nodes: Node) -> None:
        self._nodes = nodes
        self.files: dict[int, dict[str, bytes]] = {}
        self.damaged: dict[int, str] = {}
        self.launched: list[tuple[int, str, bool]] = []
        self.actors: dict[int, Served] = {}
        self.broken: list[Exception | None] = []
        self.ended: list[str] = []

    def nodes(self) -> list[Node]:
        return list(self._nodes)

    def launch(self, shard: int, node: Node, *, must_exist: bool) -> Component:
        self.launched.append((shard, node.host, must_exist))
        name = f"replay shard {shard}"
        if self.broken and (error := self.broken.pop(0)) is not None:
            return Component(name=name, actor=Actor(error))
        self.actors[shard] = Served(FakeShard(self.files.setdefault(shard, {}), self.damaged))
        return Component(name=name, actor=self.actors[shard])

    async def find(self, shard: Component) -> None:
        await shard.ask("__ray_ready__")

    async def end(self, shard: Component) -> None:
        self.ended.append(shard.name)


class Room:
    """A store of fakes."""

    def __init__(self, folder: Path, *nodes: Node, shards: int = 2) -> None:
        self.replay = FakeReplay(shards)
        self.yard = FakeYard(*(nodes or (HERE,)))
        self.notes: list[str] = []
        self.now_s = 0.0
        self.store = Store(
            Component(name="replay store", actor=Served(self.replay)),
            self.yard,
            shards=shards,
            directory=folder,
            note=self.notes.append,
            restarts=Restarts(
                SupervisorConfig(backoff_s=0.0, max_restarts=MAX_RESTARTS, window_s=WINDOW_S),
                note=self.notes.append,
                errors=ErrorLog(folder / "error.log"),
                clock=lambda: self.now_s,
            ),
            silent_s=60.0,
        )


def plan(step: int, *group_ids: int) -> BatchPlan:
    return BatchPlan(step=step, draws=tuple(Draw(group_id=i, kind=Kind.FRESH) for i in group_ids))
