"""Another application on the same machine: its own store, engine and server, and a backlog that they work off.

`python -m benchmarks.elsewhere FOLDER RATE` writes FOLDER/ready once all of it is there; RATE 0 is full speed. It works
until it is ended.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from benchmarks.stage import cli_engine, fill, fresh_store, granian, tasks_left
from deferlib.core.model import QueueConfig, QueueSource

BACKLOG = 400_000
BUCKET = 50


def config_of(rate: float) -> QueueConfig:
    """Return the default queue's configuration with that *rate* a second; 0: without one."""
    return QueueConfig(name="default", rate=rate, bucket_size=BUCKET) if rate else QueueConfig(name="default")


def main(folder: Path, rate: float) -> None:
    """Work off a backlog at *rate*, and say so in *folder*."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # by way of the blocks below, or their processes would go on
    with fresh_store() as runtime, granian(runtime) as port:
        runtime.store.migrate()
        runtime.store.run(lambda tx: tx.put_queues([config_of(rate)], QueueSource.COMMAND))
        fill(BACKLOG)
        with cli_engine("--app-url", f"http://127.0.0.1:{port}"):
            time.sleep(1.5)
            (folder / "ready").touch()
            while tasks_left():
                time.sleep(1)
        raise RuntimeError("the backlog was gone before the end")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
