"""The processes of an actor, and their end, on whatever machine of the cluster they are.

A process that was stopped (SIGSTOP), or that hangs in a driver, answers nobody, also not Ray's request to end. And the
children of one that was killed live on. So every actor is asked once which processes are its own, and SIGKILL goes to
exactly these: a number that the system has given away since is told by its start time.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from r2vpo.job.component import Component, JobFailed
from r2vpo.job.reaper import descendants

KILL_S = 20.0
"""Longest wait for another machine to end the processes (seconds)."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A process and all below it."""

    node_id: str
    """Ray's name of the machine."""
    members: tuple[tuple[int, int], ...]
    """Process number and start time (clock ticks since boot) of each."""


class Families:
    """Which processes belong to which component."""

    def __init__(self) -> None:
        self._known: dict[str, Family] = {}

    async def find(self, component: Component, *, within_s: float | None) -> Family:
        """Ask a component for its processes; waits until Ray has placed it. Errors as in ``Component.ask``."""
        family = self._known[component.name] = await component.ask("__ray_call__", _look, within_s=within_s)
        return family

    async def end(self, component: Component) -> None:
        """End a component's processes at once. Those on a machine that cannot be reached are left to its end."""
        with suppress(RayError):
            ray.kill(component.actor)
        family = self._known.pop(component.name, None)
        if family is None:
            return
        if family.node_id == ray.get_runtime_context().get_node_id():
            kill(family.members)
            return
        there = NodeAffinitySchedulingStrategy(family.node_id, soft=False)
        killer = _Remote(_kill_there.options(scheduling_strategy=there))
        with suppress(JobFailed):
            await Component(name=f"the end of {component.name}", actor=killer).ask(
                "kill", family.members, within_s=KILL_S
            )


def host_of(node_id: str) -> str:
    """The host name of a machine of the cluster; empty if it is none, or none any more."""
    return next((node["NodeManagerHostname"] for node in ray.nodes() if node["NodeID"] == node_id), "")


def kill(members: tuple[tuple[int, int], ...]) -> None:
    """SIGKILL to the processes that are still those that were seen."""
    for pid, started in members:
        with suppress(OSError):  # it has ended
            if _started(pid) == started:
                os.kill(pid, signal.SIGKILL)


def _look(actor: object) -> Family:
    """Runs in the actor's process."""
    members = []
    for pid in (os.getpid(), *descendants(os.getpid())):
        with suppress(OSError):  # it has ended
            members.append((pid, _started(pid)))
    return Family(node_id=ray.get_runtime_context().get_node_id(), members=tuple(members))


def _started(pid: int) -> int:
    """``OSError`` if there is no such process."""
    # The name before the last parenthesis may hold anything; the start time is the 20th field after it.
    return int(Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()[19])


@ray.remote(num_cpus=0, max_retries=0)
def _kill_there(members: tuple[tuple[int, int], ...]) -> None:
    kill(members)


@dataclass(frozen=True)
class _Remote:
    """A remote function under the name of a method, so that it is asked like an actor."""

    kill: Any
