"""One module for each task queue, the same names in each: what the producer calls and what its own workers import.

`setup()` makes what the store needs, `enqueue(count)` adds no-op tasks one by one, `bulk(count)` (where there is such an
API) adds them at once, `later(count)` adds tasks for in an hour, `stamp()` and `work(first, count)` add those tasks of
`tasks`, and `left()` counts the tasks that the queue still knows, whatever their state. BENCH_STORE is the store,
BENCH_OPTIONS what a contender sets, as JSON.
"""

from __future__ import annotations

import json
import os
from typing import Any

STORE = os.environ.get("BENCH_STORE", "")
OPTIONS: dict[str, Any] = json.loads(os.environ.get("BENCH_OPTIONS", "{}"))
HOUR = 3600
