"""What can go wrong with a replay store, in words. Every message names the store's file."""

from __future__ import annotations


class ReplayError(RuntimeError):
    """The store cannot do what was asked: locked by another run, disk full, not a store, a damaged payload."""


class LagViolation(ReplayError):  # noqa: N818 - the name says what happened; the run stops on it
    """A group would be trained at a lag outside its bound. The limiter makes it impossible; if it happens, stop."""
