"""Where the newest weights are announced: the learner posts, rollout workers ask and wait. No Ray here.

The board holds manifests and *references* to payloads (whatever the caller uses to find the bytes), never the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Generic, TypeVar

from r2vpo.records import NO_VERSION, Stamp, WeightManifest

Reference = TypeVar("Reference")


class WeightBoard(Generic[Reference]):
    """The newest versions of the weights; older ones are forgotten, so that their payloads can be freed."""

    def __init__(self, keep: int = 2) -> None:
        """``keep``: versions that can still be fetched. More than one, or a fetch could be overtaken by a post."""
        assert keep >= 1
        self._keep = keep
        self._posts: dict[Stamp, tuple[WeightManifest, tuple[Reference, ...]]] = {}
        self._posted = asyncio.Condition()

    async def post(self, manifest: WeightManifest, references: Sequence[Reference]) -> None:
        """Announce a version. Stamps at or above it are forgotten: a learner that resumed has given them up."""
        assert len(references) in (0, len(manifest.buckets)), "one reference per bucket, or a broadcast follows"
        async with self._posted:
            kept = {stamp: post for stamp, post in self._posts.items() if stamp < manifest.stamp}
            kept[manifest.stamp] = (manifest, tuple(references))
            self._posts = {stamp: kept[stamp] for stamp in sorted(kept)[-self._keep :]}
            self._posted.notify_all()

    async def withdraw(self) -> None:
        """Forget all versions: the learner that holds their payloads is gone."""
        self._posts = {}

    async def newest(self, after: Stamp, timeout_s: float) -> WeightManifest | None:
        """The newest manifest if its stamp is above ``after``; None if there is none within ``timeout_s`` seconds.

        Waits for `post`, and for nothing else.
        """
        async with self._posted:
            if self._newest_stamp() <= after:
                try:
                    await asyncio.wait_for(self._posted.wait_for(lambda: self._newest_stamp() > after), timeout_s)
                except TimeoutError:
                    return None
            return self._posts[self._newest_stamp()][0]

    async def references(self, stamp: Stamp) -> tuple[Reference, ...]:
        """The payloads' references of a manifest, in the order of its buckets; ``LookupError`` if it is forgotten."""
        if stamp not in self._posts:
            raise LookupError(
                f"version {stamp[1]} of the weights has been superseded; "
                f"the board holds {', '.join(str(version) for _, version in self._posts) or 'none'}"
            )
        return self._posts[stamp][1]

    def _newest_stamp(self) -> Stamp:
        return max(self._posts, default=(0, NO_VERSION))
