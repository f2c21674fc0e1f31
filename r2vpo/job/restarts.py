"""How often a component may be started again, and how long to wait before."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from r2vpo.job.component import ComponentDied, FailedForGood, JobFailed
from r2vpo.job.config import SupervisorConfig
from r2vpo.job.errorlog import ErrorLog

_RUN = "run"


class Restarts:
    """Counts restarts by component, within a window of time."""

    def __init__(
        self,
        config: SupervisorConfig,
        *,
        note: Callable[[str], None],
        errors: ErrorLog,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``note`` takes sentences for a person, ``errors`` the whole story of each failure."""
        self._config, self._note, self._errors, self._clock = config, note, errors, clock
        self._times_s: dict[str, list[float]] = {}
        self.totals: Counter[str] = Counter()
        """Restarts of the whole run, by role: ``rollout``, ``learner``, ``shard``, ``job``."""

    def count(self, component: str) -> int:
        """Restarts of ``component`` within the window up to now."""
        now_s = self._clock()
        recent_s = [at_s for at_s in self._times_s.get(component, ()) if now_s - at_s < self._config.window_s]
        self._times_s[component] = recent_s
        return len(recent_s)

    def begin(self, component: str, failure: JobFailed, *, role: str, remedy: str, is_expected: bool = False) -> float:
        """Say that ``component`` failed and what is done about it; returns the seconds to wait first.

        ``FailedForGood`` if it would fail in the same way again, or has failed too often; an expected failure does not
        count.
        """
        self._errors.add(f"{component} failed", failure)
        if failure.is_final:
            raise failure
        number = self.count(component) + 1
        window = f"{self._config.window_s / 60:g} min"
        if number > self._config.max_restarts and not is_expected:
            raise FailedForGood(
                f"{component} failed {number} times within {window}, at last so: {failure}"
            ) from failure
        self.totals[role] += 1
        # Where to read on about a death is not worth a line: there is nothing to read.
        what = str(failure).partition(":")[0] if isinstance(failure, ComponentDied) else str(failure)
        if is_expected:
            self._note(f"{what}; {remedy}: machines of its pool come and go")
            return self._config.backoff_s
        self._times_s[component].append(self._clock())
        self._note(f"{what}; {remedy} ({number} of {self._config.max_restarts} within {window})")
        return self._config.backoff_s * 2 ** (number - 1)

    def begin_all(self, failure: JobFailed, *, remedy: str) -> float:
        """`begin` for all components at once: one failure of the run.

        The restarts of its parts are forgotten: a machine that goes takes each of them along, and all of them are new.
        """
        pause_s = self.begin(_RUN, failure, role="job", remedy=remedy)
        self._times_s = {_RUN: self._times_s[_RUN]}
        return pause_s
