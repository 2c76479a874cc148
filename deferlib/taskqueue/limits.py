"""App Engine's limits, by its names."""

from __future__ import annotations

import re
from datetime import timedelta

MAX_QUEUE_NAME_LENGTH = 100
MAX_TASK_NAME_LENGTH = 500
MAX_PUSH_TASK_SIZE_BYTES = MAX_TASK_SIZE_BYTES = 100 * 1024
MAX_PULL_TASK_SIZE_BYTES = 1024 * 1024
MAX_TASKS_PER_ADD = 100
MAX_URL_LENGTH = 2083
MAX_TAG_LENGTH = 500
MAX_DISPATCH_DEADLINE = timedelta(hours=24)
MIN_DISPATCH_DEADLINE = timedelta(seconds=15)
MAX_COUNTDOWN = timedelta(days=30)

# deferlib's own: servers take request lines of 4 to 8 KB (gunicorn 4,094 bytes), and refuse longer ones for ever.
MAX_SENT_URL_LENGTH = 4_000
MAX_DEFERRED_BYTES = 32 * 1024 * 1024  # deferlib's own: a deferred call travels with its task, whatever its size

TASK_NAME = re.compile(r"[a-zA-Z0-9_-]{1,500}\Z")
QUEUE_NAME = re.compile(r"[a-zA-Z0-9-]{1,100}\Z")
METHODS = frozenset({"POST", "GET", "HEAD", "PUT", "DELETE", "PULL"})
BODY_METHODS = frozenset({"POST", "PUT", "PULL"})
