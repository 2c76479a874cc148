"""Run the measures named on the command line, or all, and print them beside their goals."""

from __future__ import annotations

import platform
import sys

import apsw
import pycurl

from benchmarks import measures

ALL = {
    "import": measures.importing,
    "enqueue": measures.enqueue,
    "bulk": measures.bulk,
    "in-process": measures.drain_in_process,
    "http": measures.drain_over_http,
    "latency": measures.latency_in_process,
    "latency-across": measures.latency_across_processes,
    "idle": measures.idle,
}


def main() -> int:
    names = sys.argv[1:] or list(ALL)
    unknown = set(names) - set(ALL)
    if unknown:
        print(f"unknown: {', '.join(sorted(unknown))}; there are: {', '.join(ALL)}", file=sys.stderr)
        return 2
    versions = f"SQLite {apsw.sqlite_lib_version()}, libcurl {pycurl.version_info()[1]}"
    print(f"Python {platform.python_version()}, {versions}, {platform.machine()}")
    print(measures.machine())
    reached = True
    for name in names:
        for row in ALL[name]():
            mark = "" if not row.goal else "ok" if row.reached else "MISSED"
            print(f"{row.measure:40} {row.figure:42} {row.goal:14} {mark}", flush=True)
            reached = reached and row.reached
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
