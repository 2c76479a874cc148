"""App Engine's limits, by its names. The limits in force are the setting `limits`: these, unless it is changed."""

from __future__ import annotations

import re
from datetime import timedelta

MAX_QUEUE_NAME_LENGTH = 100
MAX_TASK_NAME_LENGTH = 500
MAX_PUSH_TASK_SIZE_BYTES = MAX_TASK_SIZE_BYTES = 100 * 1024
MAX_PULL_TASK_SIZE_BYTES = 1024 * 1024
MAX_TRANSACTIONAL_REQUEST_SIZE_BYTES = 1024 * 1024
MAX_TASKS_PER_ADD = 100
MAX_TASKS_PER_LEASE = 1000
MAX_LEASE_SECONDS = 7 * 24 * 60 * 60
MAX_URL_LENGTH = 2083
MAX_TAG_LENGTH = 500
MAX_DISPATCH_DEADLINE = timedelta(hours=24)
MIN_DISPATCH_DEADLINE = timedelta(seconds=15)

# deferlib's own: servers take request lines of 4 to 8 KB (gunicorn 4,094 bytes), and refuse longer ones for ever.
SAFE_URL_BYTES = 4_000

NAME = re.compile(r"[a-zA-Z0-9_-]+\Z")
QUEUE_NAME = re.compile(r"[a-zA-Z0-9-]+\Z")
METHODS = ("POST", "GET", "HEAD", "PUT", "DELETE", "PULL")
