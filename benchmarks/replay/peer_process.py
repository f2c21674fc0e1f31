"""TorchRL's replay buffer, driven line by line: JSON requests on standard input, JSON answers on standard output.

Runs in the Python of the project with the packages of `torchrl.txt` put first on its path. Known to nobody but `peer`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The extension was built beside another version of torch. Its priority trees need nothing of what differs, so it is
# enough that the names which do are looked for when they are called.
sys.setdlopenflags(os.RTLD_LAZY)

import torch  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from torchrl.data import LazyMemmapStorage, PrioritizedSampler, RandomSampler, TensorDictReplayBuffer  # noqa: E402

from benchmarks.replay.groups import GroupMaker  # noqa: E402
from r2vpo.records import TrajectoryGroup  # noqa: E402

VARIANTS = 7
"""Different groups that are appended over and over."""
SPAN_S = (0.02, 0.6)
"""A child that is to be killed lives for a random time in these bounds."""


def tensors(groups: list[TrajectoryGroup]) -> TensorDict:
    """Groups as TorchRL stores them, one item each: what our payloads hold, without the texts."""

    def stacked(array: Callable[[Any], Any]) -> torch.Tensor:
        return torch.stack([torch.stack([torch.as_tensor(array(t)) for t in g.trajectories]) for g in groups])

    return TensorDict(
        {
            "token_ids": stacked(lambda t: t.token_ids_T),
            "loss_mask": stacked(lambda t: t.loss_mask_T),
            "behavior_logprob": stacked(lambda t: t.behavior_logprob_T),
            "version": stacked(lambda t: t.version_T),
            "reward": stacked(lambda t: t.reward),
            "priority": torch.tensor([g.rewards_G.std() for g in groups], dtype=torch.float32),
            "number": torch.zeros(len(groups), dtype=torch.int64),
        },
        batch_size=[len(groups)],
    )


class Buffer:
    """A replay buffer of groups on memory-mapped files, as its documentation sets one up to be saved in place."""

    def __init__(self, folder: Path, *, capacity: int, prioritized: bool, batch: int, prefetch: int) -> None:
        self._folder = folder
        self._appended = 0
        self.buffer = TensorDictReplayBuffer(
            storage=LazyMemmapStorage(capacity, scratch_dir=folder / "storage"),
            sampler=PrioritizedSampler(capacity, alpha=1.0, beta=1.0) if prioritized else RandomSampler(),
            **({"priority_key": "priority"} if prioritized else {}),
            batch_size=batch,
            prefetch=prefetch or None,
        )

    def extend(self, groups: TensorDict) -> None:
        """Append the groups, numbered through."""
        groups["number"] = torch.arange(self._appended, self._appended + len(groups))
        self.buffer.extend(groups)
        self._appended += len(groups)

    def dump(self) -> None:
        """Save what a later ``loads`` needs beside the items, which are in place."""
        self.buffer.dumps(self._folder)

    def sync(self) -> None:
        """Have all files on disk."""
        for path in self._folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())


class Peer:
    """The requests by name."""

    def __init__(self) -> None:
        self._buffers: dict[str, Buffer] = {}
        self._groups = TensorDict()

    def data(self, *, num_tokens: int, chunk: int) -> None:
        """What every call of ``extend`` is given: ``chunk`` groups."""
        maker = GroupMaker(num_tokens)
        self._groups = tensors([maker.group(f"0.{i}", version=0, num_right=1 + i % VARIANTS) for i in range(chunk)])

    def open(self, *, name: str, folder: str, **settings: Any) -> None:
        """A new buffer in an empty folder."""
        Path(folder).mkdir(parents=True)
        self._buffers[name] = Buffer(Path(folder), **settings)

    def extend(self, *, name: str, chunks: int, dump: bool, sync: bool) -> float:
        """Seconds to append; saved, and on disk, after every chunk if so wanted."""
        buffer = self._buffers[name]
        began_s = time.perf_counter()
        for _ in range(chunks):
            buffer.extend(self._groups)
            if dump:
                buffer.dump()
            if sync:
                buffer.sync()
        return time.perf_counter() - began_s

    def sample(self, *, name: str, batches: int) -> float:
        """Seconds to sample."""
        buffer = self._buffers[name].buffer
        began_s = time.perf_counter()
        for _ in range(batches):
            buffer.sample()
        return time.perf_counter() - began_s

    def kill(self, *, folder: str, kills: int, dump_every: int, prioritized: bool) -> list[tuple[int, int]]:
        """Groups that were appended before a kill -9, and those that ``loads`` then brought back, for every kill.

        ``dump_every`` counts chunks; 0 is never.
        """
        rng = random.Random(0)
        settings = {"capacity": 4096, "prioritized": prioritized, "batch": 64, "prefetch": 0}
        results = []
        for _ in range(kills):
            shutil.rmtree(folder, ignore_errors=True)
            Path(folder).mkdir(parents=True)
            appended = self._append_and_die(Path(folder), rng.uniform(*SPAN_S), dump_every, settings)
            results.append((appended, _recovered(Path(folder), settings)))
        return results

    def _append_and_die(self, folder: Path, after_s: float, dump_every: int, settings: dict[str, Any]) -> int:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            buffer = Buffer(folder, **settings)
            for number in range(1, settings["capacity"] // len(self._groups) + 1):
                buffer.extend(self._groups)
                if dump_every and number % dump_every == 0:
                    buffer.dump()
                os.write(writing, b"+")
            signal.pause()
        os.close(writing)
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(reading, "rb") as pipe:
            return len(pipe.read()) * len(self._groups)


def _recovered(folder: Path, settings: dict[str, Any]) -> int:
    """Groups that are there, and are those that were appended, after ``loads`` as documented."""
    buffer = Buffer(folder, **settings).buffer
    try:
        buffer.loads(folder)
        numbers = buffer[:]["number"] if len(buffer) else torch.zeros(0)
    except (OSError, ValueError, RuntimeError, KeyError, EOFError) as error:
        print(f"peer: loads says {type(error).__name__}: {error}", file=sys.stderr)
        return 0
    return int((numbers == torch.arange(len(numbers))).sum())


if __name__ == "__main__":
    torch.set_num_threads(1)
    peer = Peer()
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(peer, request.pop("request"))(**request)), file=answers, flush=True)
