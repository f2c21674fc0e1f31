"""What can go wrong with a replay store, in words. Every message names the store's file."""

from __future__ import annotations


class ReplayError(RuntimeError):
    """The store cannot do what was asked: locked by another run, not a store, a missing log, a damaged file."""


class DiskFull(ReplayError):  # noqa: N818 - the name says what happened
    """There was no room for a change, and nothing of it was kept. The same call works once there is room again."""


class DamagedFile(ReplayError):  # noqa: N818 - the name says what happened
    """Bytes on the disk are not those that were written, or cannot be read."""


class LagViolation(ReplayError):  # noqa: N818 - the name says what happened; the run stops on it
    """A group would be trained at a lag outside its bound. The limiter makes it impossible; if it happens, stop."""
