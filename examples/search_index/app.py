"""A search engine for the source code on this machine: every file is indexed by a deferred call of its own.

By hand: `deferlib dev examples.search_index.app:app`; see README.md. Environment: SEARCH_FOLDERS (the folders that may be
indexed, separated as in PATH), SEARCH_PATTERN (which files, by default *.py), SEARCH_INDEX (the index's file).
"""

from __future__ import annotations

import os
import sysconfig
from itertools import islice
from pathlib import Path

from flask import Flask, abort, redirect, render_template, request
from markupsafe import Markup, escape
from werkzeug.wrappers import Response

import deferlib
from deferlib.taskqueue import TaskRetryOptions
from examples.search_index import index

MOST = 3_000  # files that one POST defers, unless it says otherwise
# Folders below the one that was asked for: Python keeps files there that are broken on purpose, to test itself with,
# and site-packages is a folder of its own.
SKIPPED = {"__pycache__", "dist-packages", "site-packages", "test", "tests"}

RETRIES = 2  # so three attempts, then the call is a dead letter
RETRY_OPTIONS = TaskRetryOptions(task_retry_limit=RETRIES, min_backoff_seconds=0.5, max_backoff_seconds=2)

index.require_fts5()
app = Flask(__name__)
app.wsgi_app = deferlib.wrap_wsgi_app(app.wsgi_app)  # type: ignore[method-assign]  # Flask's own idiom for middleware


# --- the deferred call ----------------------------------------------------------------------------------------------


def defer_file(path: str) -> str:
    """Have the file at *path* indexed, soon; return the task's name. Once this returns, nothing stops it any more."""
    task = deferlib.defer(index_file, path, _retry_options=RETRY_OPTIONS)
    return str(task.name)


def index_file(path: str) -> None:
    """Put one file into the index. This is what runs later, at least once; `index.put` makes twice the same as once."""
    task = deferlib.current_task()
    assert task is not None, "runs as a deferred call only"
    index.note_start(task.name, task.attempt)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        index.note_failure(path, task.name, str(error))
        raise  # whatever a call raises makes deferlib try again, up to the limit, and then keep it as a dead letter
    index.put(path, text)


# --- the pages ------------------------------------------------------------------------------------------------------


@app.get("/")
def home() -> str:
    return render_template(
        "home.html", progress=index.progress(RETRIES), failures=index.failures(), folders=folders(), most=MOST
    )


@app.get("/progress")
def progress() -> dict[str, int]:
    return index.progress(RETRIES)._asdict()


@app.get("/search")
def search() -> str:
    words = request.args.get("q", "")
    count, hits = index.search(words)
    shown = [(hit.path, marked(hit.snippet)) for hit in hits]
    return render_template("search.html", words=words, count=count, hits=shown)


@app.post("/index")
def index_folder() -> Response:
    """Defer one call for each file of the form's *folder*, up to its *limit*."""
    folder = Path(request.form.get("folder", ""))
    if folder not in folders():  # anybody's page can make a browser post to localhost
        abort(403, "Only folders in SEARCH_FOLDERS may be indexed.")
    files = iter(sources(folder, request.form.get("limit", MOST, type=int)))
    while batch := list(islice(files, 100)):  # each call is on disk by itself; only the journal is written in batches
        index.note_deferred((defer_file(path), path) for path in batch)
    return redirect("/", 303)


# --- helpers --------------------------------------------------------------------------------------------------------


def folders() -> list[Path]:
    """Return the folders that may be indexed: by default Python's library and the packages beside it."""
    given = os.environ.get("SEARCH_FOLDERS")
    paths = given.split(os.pathsep) if given else [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    return [Path(path) for path in paths]


def sources(folder: Path, limit: int) -> list[str]:
    """Return the files of *folder* and the folders below it, in order, at most *limit*."""
    pattern = os.environ.get("SEARCH_PATTERN", "*.py")
    found = (path for path in sorted(folder.rglob(pattern)) if not SKIPPED.intersection(path.relative_to(folder).parts))
    return list(islice((str(path) for path in found if path.is_file()), max(limit, 0)))


def marked(snippet: str) -> Markup:
    """Return *snippet* as HTML: first all of it escaped, then the matches marked."""
    return Markup(escape(snippet).replace(index.MATCH, Markup("<mark>")).replace(index.END_MATCH, Markup("</mark>")))
