"""Starts and ends the private Ray of a job: ``python -m tests.e2e.private_ray CONFIG LOGS``.

Prints the address of its GCS and the token; stays until standard input closes, and leaves its logs as after a failure.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from r2vpo.job.config import load_config


def main(config_file: str, logs: Path) -> None:
    config = load_config(Path(config_file))
    os.environ.update(config.ray.environment())
    import ray

    from r2vpo.job.cluster import close_cluster, open_cluster

    open_cluster(config, logs)
    print(ray.get_runtime_context().gcs_address, os.environ["RAY_AUTH_TOKEN"], flush=True)
    sys.stdin.read()
    close_cluster(logs, keep_logs=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
