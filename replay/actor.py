"""The Ray shell of the replay service: the same methods, called with ``.remote``.

It is never restarted by Ray: a second incarnation would know none of the leases that workers still hold. Whoever
supervises the run starts a new one, at the step of the learner's checkpoint.
"""

from __future__ import annotations

import ray

from replay.service import ReplayService

ReplayActor = ray.remote(num_cpus=0, max_restarts=0)(ReplayService)
