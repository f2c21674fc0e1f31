"""Run every part in a process of its own, print the table, write the result file.

    make bench NAME=cluster [QUICK=1]
    python -m benchmarks.cluster PART …      some parts alone, without a result file

Everything listens on the loopback address and ends with its part.
"""

from __future__ import annotations

import subprocess
import sys
import time

from benchmarks.table import Row, run_part, table, write

PARTS = ("submit", "scale", "weights")


def main(parts: list[str]) -> int:
    rows: list[Row] = []
    for part in parts or PARTS:
        began_s = time.monotonic()
        try:
            rows += run_part(f"benchmarks.cluster.{part}")
        except subprocess.CalledProcessError as error:
            rows.append(Row(f"{part}: measured to its end", float(error.returncode), "exit status", "0", False))
        print(f"{part}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    print(table(rows))
    if not parts:
        write("cluster", rows)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
