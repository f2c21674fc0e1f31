"""Environment variables of an engine's processes. They must be set before vLLM or torch is imported.

The roof hands them to the Ray actor (`runtime_env`), a test sets them itself. Each carries its reason.
"""

from __future__ import annotations

from rollout.config import RolloutConfig


def engine_environment(config: RolloutConfig, *, on_gpu: bool) -> dict[str, str]:
    """Variables for the process of one rollout worker; vLLM's own processes inherit them."""
    environment = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        # Weights are handed over as a file in shared memory; objects are never unpickled from requests.
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if on_gpu:
        return environment
    return environment | {
        "OMP_NUM_THREADS": str(config.omp_threads),
        # Binding would put every engine and learner of a small machine on the same first core.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        # Model and scheduler in one process: no ring buffer is polled between them. On two cores this is 1.5 times as
        # fast, starts sooner and leaves an idle engine at rest.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Eager on CPU: without this the sampler's small helpers are compiled by a C++ compiler at the first token.
        "TORCHDYNAMO_DISABLE": "1",
    }
