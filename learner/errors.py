"""What may go wrong for good in the learner; light to import, so that the driver can tell it from a lost process."""

from __future__ import annotations


class WeightsNotFinite(RuntimeError):  # noqa: N818 - says what happened
    """The learner's weights are broken. The run must stop: its last checkpoint holds the last good ones."""
