"""`deferlib engine` with a clock around libcurl: `python -m benchmarks.curl_clock engine …`.

A profiler would slow the engine's many small Python functions more than libcurl's few calls, and so move the very line
that is measured. This reads the thread's CPU clock where that line is crossed, and nowhere else: when pycurl is called,
and when it calls back. What a reading costs is measured too and taken off.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import thread_time_ns
from typing import Any

import pycurl

BENCH_CURL = "BENCH_CURL"  # the file that the seconds are written to

_inside = 0  # nanoseconds in libcurl
_crossings = 0
_entered = 0
_depth = 0


def libcurl_seconds(path: Path) -> float:
    """Return what an engine that has ended wrote to *path*."""
    return float(json.loads(path.read_text()))


def _timed(call: Callable[..., Any]) -> Callable[..., Any]:
    def crossing(*arguments: Any) -> Any:
        global _inside, _crossings, _entered, _depth
        if _depth:
            return call(*arguments)
        _depth = 1
        _crossings += 1
        _entered = thread_time_ns()
        try:
            return call(*arguments)
        finally:
            _inside += thread_time_ns() - _entered
            _depth = 0

    return crossing


def _called_back(callback: Callable[..., Any]) -> Callable[..., Any]:
    """Return *callback*, its own time not counted."""

    def crossing(*arguments: Any) -> Any:
        global _inside, _crossings, _entered, _depth
        if not _depth:
            return callback(*arguments)
        _inside += thread_time_ns() - _entered
        _crossings += 1
        _depth = 0
        try:
            return callback(*arguments)
        finally:
            _depth = 1
            _entered = thread_time_ns()

    return crossing


def _setopt(setopt: Callable[..., Any]) -> Callable[..., Any]:
    def setting(self: Any, option: int, value: Any) -> Any:
        return setopt(self, option, _called_back(value) if callable(value) else value)

    return setting


class TimedCurl(pycurl.Curl):  # type: ignore[misc]  # pycurl has no types
    setopt = _setopt(_timed(pycurl.Curl.setopt))
    getinfo = _timed(pycurl.Curl.getinfo)
    getinfo_raw = _timed(pycurl.Curl.getinfo_raw)


class TimedMulti(pycurl.CurlMulti):  # type: ignore[misc]  # pycurl has no types
    setopt = _setopt(_timed(pycurl.CurlMulti.setopt))
    socket_action = _timed(pycurl.CurlMulti.socket_action)
    add_handle = _timed(pycurl.CurlMulti.add_handle)
    remove_handle = _timed(pycurl.CurlMulti.remove_handle)
    info_read = _timed(pycurl.CurlMulti.info_read)


def _cost_of_a_crossing() -> float:
    """Return the nanoseconds that the clock itself adds between its two readings."""
    global _inside, _crossings
    empty = _timed(lambda: None)
    for _ in range(50_000):
        empty()
    cost = _inside / _crossings
    _inside = _crossings = 0
    return cost


def main() -> int:
    """Run deferlib's command, and write how many seconds of its CPU time were libcurl's."""
    from deferlib import cli

    cost = _cost_of_a_crossing()
    pycurl.Curl, pycurl.CurlMulti = TimedCurl, TimedMulti
    try:
        return cli.main(sys.argv[1:])
    finally:
        seconds = (_inside - _crossings * cost) / 1e9
        Path(os.environ[BENCH_CURL]).write_text(json.dumps(seconds))


if __name__ == "__main__":
    sys.exit(main())
