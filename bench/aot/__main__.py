"""Compile what is shipped, print what it takes and how the committed table differs. 1 if a gate failed."""

import argparse
import difflib
import os
import sys
import time

from bench.aot import gates, table
from bench.aot.cases import cases
from bench.aot.measure import measure
from bench.aot.resources import Resources
from bench.aot.shipped import each_kernel_once, shipped
from bench.aot.table import Key, Row
from fastjepa_kernels.language import INTERPRETED


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table of this version of Triton")
    parser.add_argument("--only", default="", help="kernels, targets or cases with this in their names")
    parser.add_argument("--once", action="store_true", help="compile each kernel once for each target")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and the interpreter's kernels cannot be compiled")
    if options.write and (options.only or options.once):
        parser.error("--write needs all rows: leave --only and --once away")

    every = shipped(cases())
    chosen = each_kernel_once(every) if options.once else every
    chosen = {key: one for key, one in chosen.items() if options.only in f"{' '.join(key)} {one.case}"}
    start = time.monotonic()
    measured: dict[Key, Resources | str] = {}
    rows: dict[Key, Row] = {}
    print(table.heading())
    work = [one.compilation for one in chosen.values()]
    for (key, one), said in zip(chosen.items(), measure(work, options.jobs), strict=True):
        measured[key] = said
        if isinstance(said, Resources):
            rows[key] = Row(*key, str(one.case), said)
            print(table.columns(rows[key]), flush=True)
    seconds = time.monotonic() - start
    print(f"{len(measured)} of {len(every)} compilations in {seconds:.0f} s")

    file = table.path()
    if options.write:
        table.write(file, rows.values())
    before = table.read(file)
    if before is None:
        print(f"{file.name}: none is committed for this version of Triton; `make aot ARGS=--write` writes it")
    else:
        old = table.lines(row for key, row in before.items() if key in chosen or key not in every)
        new = table.lines(rows.values())
        for line in difflib.unified_diff(old, new, file.name, "now", n=0, lineterm=""):
            print(line)
    wrong = gates.verdict(every, measured, before)
    for each in wrong:
        print("FAILED", each)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
