"""The documentation is complete, its links lead somewhere, its commands parse, and its Python runs."""

from __future__ import annotations

import argparse
import ast
import html
import importlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import yaml

from deferlib import errors, queue_fields, queue_yaml
from deferlib.cli import _parser
from deferlib.cli.settings import FLAGS
from deferlib.core.backoff import backoff
from deferlib.core.model import SECOND, RetryPolicy
from deferlib.queue_fields import Place
from deferlib.settings import SETTINGS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
EXTENSIONS = DOCS / "_ext"
README = ROOT / "README.md"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
MODULES = (
    "deferlib",
    "deferlib.deferred",
    "deferlib.taskqueue",
    "deferlib.namespaces",
    "deferlib.task_logs",
    "deferlib.testing",
    "deferlib.contrib.asgi",
    "deferlib.errors",
)
SHELLS = {"", "shell", "bash", "sh", "console"}
MOST_NOT_RUN = 5


def by_path(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="session")
def snippets() -> ModuleType:
    """The module that takes pages apart, from docs/_ext, which is no package."""
    sys.path.insert(0, str(EXTENSIONS))
    try:
        return importlib.import_module("snippets")
    finally:
        sys.path.remove(str(EXTENSIONS))


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Build the documentation as `make docs` does; return how that went, and where it is."""
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--quiet", "--builder", "html"]
    command += ["--doctree-dir", str(out / "doctrees"), str(DOCS), str(out / "html")]
    # A terminal's width and colours must not matter.
    environ = {**os.environ, "COLUMNS": "300", "PYTHONWARNINGS": "default"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environ, check=False)
    return done, out / "html"


def source(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def text_of(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


def page_of(build: tuple[subprocess.CompletedProcess[str], Path], name: str) -> str:
    """Return the HTML of a built page's own part, without the navigation around it."""
    markup = (build[1] / name).read_text(encoding="utf-8")
    return markup[markup.index("<article") : markup.index("</article>")]


# --- it builds ------------------------------------------------------------------------------------------------------


def test_docs_build_without_warnings_and_dead_links(build: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    done, out = build

    assert done.returncode == 0, done.stdout + done.stderr
    assert (out / "index.html").exists()


def test_nothing_is_loaded_from_another_host(build: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    for path in build[1].rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", path.read_text(encoding="utf-8"))
        assert [tag for tag in tags if re.search(r'(?:src|href)="(?:https?:)?//', tag)] == [], path
    for path in build[1].rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", path.read_text(encoding="utf-8")), path


# --- the reference is complete --------------------------------------------------------------------------------------


def public_names(module: ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    found = inspect.getmembers(module, lambda value: inspect.isclass(value) or inspect.isfunction(value))
    return [name for name, value in found if not name.startswith("_") and value.__module__ == module.__name__]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_is_in_the_api_reference(name: str, build: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    module = importlib.import_module(name)
    markup = page_of(build, "reference/api.html")
    said = set(re.findall(r"[\w.]+", text_of(markup)))

    full = [f"{name}.{each}" for each in public_names(module)]
    reserved = [f"deferlib.{each}" for each in getattr(module, "_LATER", ())]

    assert full
    assert [each for each in [*full, *reserved] if f'id="{each}"' not in markup and each not in said] == []


def test_every_error_has_an_entry_of_its_own(build: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    markup = page_of(build, "reference/api.html")
    classes = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, BaseException)]

    assert len(classes) > 40
    assert [each.__name__ for each in classes if f'id="deferlib.errors.{each.__name__}"' not in markup] == []


def test_errors_said_never_to_be_raised_are_never_made() -> None:
    _, _, rest = source("reference/api.md").partition("This version never raises them:")
    listed = set(re.findall(r"`(\w+)`", rest.partition("\n\n")[0]))

    made = set()
    for path in (ROOT / "deferlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise | ast.Call):
                function = node.exc if isinstance(node, ast.Raise) else node.func
                if isinstance(function, ast.Name):
                    made.add(function.id)

    assert len(listed) > 5
    assert listed <= set(vars(errors))
    assert listed & made == set()


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_a_section_with_its_facts_and_a_text(
    name: str, build: tuple[subprocess.CompletedProcess[str], Path]
) -> None:
    markup = page_of(build, "reference/settings.html")
    kind = SETTINGS[name]

    _, _, section = markup.partition(f'<section id="{name.replace("_", "-")}">')
    section = section.partition("</section>")[0]
    table, _, prose = section.partition("</table>")

    words = text_of(table).split("\n")
    default = f"{kind.default:g}" if isinstance(kind.default, float) else str(kind.default or "none")
    assert {f"DEFERLIB_{name.upper()}", f"{name}=", default, kind.allowed, FLAGS.get(name, "none")} <= set(words)
    assert len(text_of(prose)) > 80


def test_no_setting_is_made_up() -> None:
    named = set(
        re.findall(r"\bDEFERLIB_([A-Z]+)\b", "".join(path.read_text(encoding="utf-8") for path in [README, *PAGES]))
    )

    assert named
    assert {name.lower() for name in named} <= set(SETTINGS)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_every_command_and_option_is_in_the_cli_reference(
    build: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    markup = page_of(build, "reference/cli.html")
    known = list(parsers(_parser()))

    assert len(known) > 12
    for parser in known:
        _, found, section = markup.partition(f'<section id="{parser.prog.replace(" ", "-")}">')
        section = text_of(section.partition("</section>")[0])
        options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
        assert found, parser.prog
        assert [option for option in options if option not in section] == [], parser.prog
        assert all(len(line) <= 80 for line in section.splitlines()), parser.prog


KEYS = {
    "Keys of the file": queue_fields.TOP_KEYS,
    "Keys of a queue": queue_fields.KEYS,
    "Keys of retry_parameters": queue_fields.RETRY_KEYS,
    "Keys of a queue's deferlib map": queue_fields.OWN_KEYS,
}


def rows_of(heading: str, page: str) -> list[list[str]]:
    """Return the cells of the table under *heading*."""
    _, found, section = page.partition(f"\n## {heading}\n")
    assert found, heading
    lines = re.findall(r"^\| (.+) \|$", section.partition("\n## ")[0], re.MULTILINE)
    return [line.split(" | ") for line in lines[1:] if not line.startswith("---")]


@pytest.mark.parametrize("heading", KEYS)
def test_every_key_of_queue_yaml_is_in_its_table(heading: str) -> None:
    rows = rows_of(heading, source("reference/queue-yaml.md"))

    assert {row[0].strip("`") for row in rows} == KEYS[heading]


@pytest.mark.parametrize("heading", list(KEYS)[1:])
def test_a_default_of_queue_yaml_changes_nothing_when_it_is_written(heading: str) -> None:
    defaults: dict[str, Any] = {
        row[0].strip("`"): yaml.safe_load(row[2].strip("`"))
        for row in rows_of(heading, source("reference/queue-yaml.md"))
        if row[2].startswith("`")
    }
    around = {"Keys of retry_parameters": "retry_parameters", "Keys of a queue's deferlib map": "deferlib"}.get(heading)

    written = queue_fields.from_mapping({"name": "q", **({around: defaults} if around else defaults)}, Place("docs"))

    assert len(defaults) >= 2
    assert written == queue_fields.from_mapping({"name": "q"}, Place("docs"))


def test_yaml_of_every_page_is_a_queue_yaml(snippets: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "queue.yaml"
    found = 0
    for page in [README, *PAGES]:
        for block in snippets.blocks(page.read_text(encoding="utf-8")):
            if block.language == "yaml" and re.search(r"^queue:", block.text, re.MULTILINE):
                path.write_text(block.text, encoding="utf-8")
                assert queue_yaml.read(path).queues, page
                found += 1
    assert found >= 3


def test_waits_in_the_table_are_those_of_the_formula() -> None:
    policies = [RetryPolicy(), RetryPolicy(min_backoff=10 * SECOND, max_doublings=3)]
    rows = rows_of("Retries and their waits", source("explanation/how-it-works.md"))

    assert len(rows) > 8
    for retry, *waits in rows:
        expected = [f"{backoff(policy, int(retry), Random(0)) / SECOND:g} s" for policy in policies]
        assert waits == expected, retry


def test_http_reference_has_every_header_and_outcome() -> None:
    page = source("reference/http.md")
    sources = [(ROOT / "deferlib" / name).read_text(encoding="utf-8") for name in ("engine/dispatch.py", "context.py")]
    formats = source("reference/formats.md")

    headers = set(re.findall(r'"(X-AppEngine-[\w-]+)"', "".join(sources)))
    outcomes = {row[0] for row in rows_of("The handler's answer", formats)}

    assert len(headers) >= 7
    assert len(outcomes) >= 8
    assert [each for each in headers if f"| `{each}` |" not in page] == []
    assert [each for each in outcomes if f"| {each} |" not in page] == []


# --- commands -------------------------------------------------------------------------------------------------------


def commands_in(line: str) -> Iterator[list[str]]:
    """Yield the arguments of every `deferlib …` in a line of shell."""
    lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*lexer, ";"]:
        if not set(token) <= set("();<>|&"):
            words.append(token)
            continue
        given = words[:]
        while words and (re.match(r"[A-Za-z_]\w*=", words[0]) or words[0] in ("sudo", "exec", "!", "if")):
            del words[0]
        if words and words[0] == "xargs":
            del words[0]
            while words and words[0].startswith("-"):
                del words[0]
            words.append("NAME")
        if words and os.path.basename(words[0]) == "deferlib":
            yield words[1:]
        assert "deferlib" not in given or "deferlib" in words, line
        words = []


def mistake_in(arguments: list[str]) -> str:
    """Return what the real parser has against *arguments*; '' if nothing."""
    said = io.StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            _parser().parse_args(arguments)
    except SystemExit as end:
        return said.getvalue() or ("" if end.code == 0 else "refused")
    return ""


def shell_lines(block: Any) -> Iterator[str]:
    if block.language in SHELLS:
        for line in block.text.replace("\\\n", " ").splitlines():
            if re.search(r"(?:^|[\s/])deferlib(?:\s|$)", line.partition(" # ")[0]) and not line.startswith("#"):
                yield line
    yield from re.findall(r"^Exec\w+=(\S*deferlib .*)$", block.text, re.MULTILINE)  # systemd


@pytest.mark.parametrize("page", [README, *PAGES], ids=by_path)
def test_commands_in_shell_blocks_parse(page: Path, snippets: ModuleType) -> None:
    for block in snippets.blocks(page.read_text(encoding="utf-8")):
        for line in shell_lines(block):
            for arguments in commands_in(line):
                assert mistake_in(arguments) == "", f"{page}: {line}"


@pytest.mark.parametrize("page", [README, *PAGES], ids=by_path)
def test_commands_in_the_text_parse_or_are_the_beginning_of_one(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    beginnings = {parser.prog for parser in parsers(_parser())}
    for code in re.findall(r"(?<!`)`(deferlib [^`]+)`(?!`)", prose):
        command = " ".join(code.split())
        if command in beginnings or re.search(r"[…\[\]]", command):
            continue
        arguments = shlex.split(command)[1:]
        mistakes = [mistake_in(arguments), mistake_in([*arguments, "NAME"])]  # `deferlib engine --app` lacks only that
        assert "" in mistakes, f"{page}: {command}: {mistakes[0]}"


def test_the_shell_reader_finds_commands_and_the_parser_their_mistakes() -> None:
    line = (
        "DEFERLIB_KEY=k deferlib tasks list --json | jq '.tasks[] | .id' | xargs -r deferlib tasks retry --queue q  # all"
    )

    assert list(commands_in(line)) == [["tasks", "list", "--json"], ["tasks", "retry", "--queue", "q", "NAME"]]
    assert mistake_in(["tasks", "list", "--jsn"])
    assert mistake_in(["tasks", "list", "--json"]) == ""


# --- snippets -------------------------------------------------------------------------------------------------------


def with_python() -> list[Path]:
    return [page for page in [README, *PAGES] if re.search(r"^```python", page.read_text(encoding="utf-8"), re.MULTILINE)]


@pytest.mark.parametrize("page", with_python(), ids=by_path)
def test_python_of_a_page_runs(page: Path) -> None:
    command = [sys.executable, "-W", "error", str(EXTENSIONS / "snippets.py"), str(page)]
    if page == README:
        command.append("--fragments")  # its first block shows how a call looks

    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("a fragment") <= 1, done.stdout


def test_few_snippets_are_not_run(snippets: ModuleType) -> None:
    left_out = []
    for page in [README, *PAGES]:
        for block in snippets.blocks(page.read_text(encoding="utf-8")):
            elsewhere = re.match(r"(tests/\w+\.py) runs it", block.not_run)
            if elsewhere:
                assert page.name in (ROOT / elsewhere[1]).read_text(encoding="utf-8"), f"{page}:{block.line}"
            elif block.not_run:
                left_out.append(f"{by_path(page)}:{block.line}: {block.not_run}")

    assert len(left_out) <= MOST_NOT_RUN, "\n".join(left_out)
