"""When a run writes its checkpoints, and what becomes of one that cannot be written.

    learner step ──is one due?──▶ learner group: save ──▶ the store may forget what no resume needs any more
                                        │ failed: noted, the run goes on with the checkpoint before
                                        └ failed three times in a row: the run stops

Generation goes on meanwhile: the workers do not wait for the learner until the limiter makes them.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from learner.checkpoint import SaveFailed, resumable
from learner.config import LearnerConfig
from r2vpo.job.component import plain_message

MAX_FAILURES = 3
"""Attempts in a row that may fail."""
RETRY_S = 30.0
"""After a failed attempt, how long not to try again (seconds): somebody may be making room."""


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        config: LearnerConfig,
        directory: Path,
        *,
        note: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """``note`` takes a sentence for the user; ``now`` is a clock that never goes back (seconds)."""
        self._config, self._directory, self._note, self._now = config, directory, note, now
        self.saved_step = 0
        """The step of the newest checkpoint, or that at which the run began."""
        self.failure = ""
        """Why the last attempt failed; empty if it did not."""
        self._failures = 0
        self._failed_s = self._spent_s = 0.0

    @property
    def oldest_resumable(self) -> int:
        """The run may be resumed at this step and later ones: at a checkpoint that counts, or at its beginning."""
        return min(resumable(self._directory, keep=self._config.keep_checkpoints), default=0)

    def is_due(self, step: int) -> bool:
        """Whether a multiple of ``checkpoint_every`` has been passed since the last one that was written."""
        every = self._config.checkpoint_every
        waiting = self._failures > 0 and self._now() - self._failed_s < RETRY_S
        return every > 0 and step // every > self.saved_step // every and not waiting

    async def write(self, step: int, save: Callable[[Path], Awaitable[None]]) -> bool:
        """Have ``save`` write the checkpoint of ``step``, unless it is there. False if that failed, which is noted.

        ``save`` is given the directory of all checkpoints. ``SaveFailed`` once ``MAX_FAILURES`` attempts in a row have
        failed.
        """
        if step == self.saved_step:
            return True
        began_s = self._now()
        try:
            await save(self._directory)
        except SaveFailed as error:
            self._failures, self._failed_s = self._failures + 1, self._now()
            kept = f"step {self.saved_step}" if self.saved_step else "the beginning"
            self.failure = f"{plain_message(error)}; a resume would go on from {kept}: make room in {self._directory}"
            if self._failures == MAX_FAILURES:
                raise SaveFailed(f"{self.failure} (attempt {MAX_FAILURES} of {MAX_FAILURES})") from error
            self._note(self.failure)
            return False
        finally:
            self._spent_s += self._now() - began_s
        self.saved_step, self.failure, self._failures = step, "", 0
        return True

    def take_spent_s(self) -> float:
        """Seconds spent on writing since this was last asked."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s
