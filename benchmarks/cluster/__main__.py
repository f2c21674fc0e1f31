"""Run every part in a process of its own, print the table, write the result file.

    make bench NAME=cluster [QUICK=1]
    python -m benchmarks.cluster PART …      some parts alone, without a result file

Everything listens on the loopback address and ends with its part.
"""

from __future__ import annotations

import sys

from benchmarks.table import run_benchmark

PARTS = ("submit", "scale", "weights")

if __name__ == "__main__":
    sys.exit(run_benchmark("cluster", PARTS, only=sys.argv[1:]))
