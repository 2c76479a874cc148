"""Run the Python of a page, as a reader would: block after block, in one module, in an empty folder.

    python docs/_ext/snippets.py docs/how-to/retry.md

What a reader doesn't see tells how:

- `% not run: REASON` before a block leaves it out; it is still compiled.
- `% run: CODE` runs a line in between: a request to the app that the page has just built, say.
- A block that begins with `# NAME.py` is a file of that name, with `# NAME.py, at the end` more of it. It is imported at
  once; `test_….py` is run by pytest at the end.
- The queues of YAML blocks are there.

What the page defers runs afterwards, on a clock that is moved by two days. A page that makes its own engine or runtime has
its way instead.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

_FENCE = re.compile(r"(?P<fence>```+)(?P<language>[^\n`]*)\n(?P<text>.*?)^(?P=fence)[ ]*$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (?P<name>[\w/]+\.py)\b(?P<more>, at the end)?")
_NOT_RUN = re.compile(r"^(?:% |<!-- )not run: (?P<reason>.+?)(?: -->)?\s*\Z", re.MULTILINE)
_RUN = re.compile(r"^(?:% |<!-- )run: (?P<code>.+?)(?: -->)?$", re.MULTILINE)
_OWN_ENGINE = re.compile(r"deferlib\.(running|configure)\(")
# A deferred call that ends so is a mistake in the page: no page fails by one of these on purpose.
_MISTAKES = ("NameError", "TypeError", "AttributeError", "ImportError", "ModuleNotFoundError", "SyntaxError")


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str
    line: int  # of its first line of text, from 1
    not_run: str  # why not, '' if it is run
    file: str = ""  # what the page says it is to be saved as, '' if nothing
    more: bool = False  # to be added to the file, not saved instead of it


def blocks(page: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page's text, hidden lines to run among them as blocks of language `run`."""
    end = 0
    for match in _FENCE.finditer(page):
        yield from _hidden(page, end, match.start())
        text = match["text"]
        excuse = _NOT_RUN.search(page, end, match.start())
        name = _FILE.match(text)
        yield Block(
            language=match["language"].strip(),
            text=text,
            line=page.count("\n", 0, match.start("text")) + 1,
            not_run=excuse["reason"] if excuse else "",
            file=name["name"] if name else "",
            more=bool(name and name["more"]),
        )
        end = match.end()
    yield from _hidden(page, end, len(page))


def _hidden(page: str, start: int, end: int) -> Iterator[Block]:
    for match in _RUN.finditer(page, start, end):
        yield Block("run", match["code"], page.count("\n", 0, match.start()) + 1, "")


def run_page(path: Path, *, fragments: bool = False) -> None:
    """Run the page at *path* in the working directory; whatever is wrong with it raises.

    With *fragments*, a block that uses a name which the page never gives it is let pass: it shows how something looks.
    """
    found = list(blocks(path.read_text(encoding="utf-8")))
    code = "\n".join(block.text for block in found if block.language == "python")
    queues = _write_queues(found)
    sys.path.insert(0, os.getcwd())
    if _OWN_ENGINE.search(code):
        _execute(path, found, fragments)
    else:
        from deferlib import testing

        with testing.engine(_app_of_page, queues=queues) as engine:
            _execute(path, found, fragments)
            attempts = engine.advance(timedelta(days=2))
        for attempt in attempts:
            if attempt.outcome not in ("ok", "retry", "permanent", "") or attempt.error.startswith(_MISTAKES):
                raise SystemExit(f"{path}: {attempt}")
        if engine.tasks() and not any(attempt.ok for attempt in attempts):
            raise SystemExit(f"{path}: what it defers never ran")
    tests = [block.file for block in found if block.file.startswith("test_") and not block.not_run]
    if tests:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], check=True)


def _app_of_page(environ: dict[str, Any], start_response: Any) -> Any:
    """Answer as the app that the page has made, for tasks with a URL of their own."""
    from deferlib import deferred, wrap_wsgi_app

    app = vars(sys.modules["page"]).get("app")
    return (wrap_wsgi_app(app) if callable(app) else deferred.application)(environ, start_response)


def _write_queues(found: list[Block]) -> str | None:
    """Write the queues of all YAML blocks to one queue.yaml; return its path, None if there is none."""
    import yaml

    queues: dict[str, object] = {}
    for block in found:
        if block.language == "yaml" and re.search(r"^queue:", block.text, re.MULTILINE):
            queues |= {queue["name"]: queue for queue in yaml.safe_load(block.text)["queue"]}
    if not queues:
        return None
    Path("queue.yaml").write_text(yaml.safe_dump({"queue": list(queues.values())}), encoding="utf-8")
    return os.path.abspath("queue.yaml")


def _execute(path: Path, found: list[Block], fragments: bool) -> None:
    module = ModuleType("page")
    module.__file__ = str(path)
    sys.modules["page"] = module  # so that what it defers is found by its name
    for block in found:
        if block.language not in ("python", "run"):
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(path), "exec")
        if block.not_run:
            continue
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            with open(block.file, "a" if block.more else "w", encoding="utf-8") as file:
                file.write(block.text)
            if not block.file.startswith(("test_", "conftest")):
                _import(block.file, module)
            continue
        try:
            exec(code, module.__dict__)
        except NameError:
            if not fragments:
                raise
            print(f"{path}:{block.line}: a fragment")


def _import(file: str, page: ModuleType) -> None:
    """Import the file that the page has just shown; the blocks that follow know its names."""
    name = file.removesuffix(".py").replace("/", ".")
    importlib.invalidate_caches()
    sys.modules.pop(name, None)
    names = vars(importlib.import_module(name))
    vars(page).update({key: value for key, value in names.items() if not key.startswith("_")})
    root = name.partition(".")[0]
    vars(page).setdefault(root, importlib.import_module(root))  # a page may name a file app.py, and an app in it `app`


def main() -> None:
    """Run the page that the command line names."""
    path = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in [name for name in os.environ if name.startswith("DEFERLIB_")]:
            del os.environ[name]
        run_page(path, fragments="--fragments" in sys.argv)
        os.chdir("/")


if __name__ == "__main__":
    main()
