"""Run every part in a process of its own, print the table, write the result file.

make bench NAME=faults [QUICK=1]
python -m benchmarks.faults PART …      some parts alone, without a result file
"""

from __future__ import annotations

import sys

from benchmarks.table import run_benchmark

PARTS = ("checkpoint", "drills", "pressure", "repeated")

if __name__ == "__main__":
    sys.exit(run_benchmark("faults", PARTS, only=sys.argv[1:]))
