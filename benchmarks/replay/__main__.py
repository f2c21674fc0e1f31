"""Run every part in a process of its own, print the table, write the result file.

    make bench NAME=replay [QUICK=1]
    python -m benchmarks.replay PART …      some parts alone, without a result file

Needs Linux, and for two of the rows user namespaces. TorchRL is installed beside, into ``build/``.
"""

from __future__ import annotations

import sys

from benchmarks.table import run_benchmark

PARTS = ("crash", "damage", "append", "sample", "peer")

if __name__ == "__main__":
    sys.exit(run_benchmark("replay", PARTS, only=sys.argv[1:]))
