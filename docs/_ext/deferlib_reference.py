"""The parts of the reference that are read from the code: names, settings, commands.

`{api} MODULE` documents every public name of a module, `{setting} NAME` states the facts of a setting, `{cli}` prints the
help of every command. What is added to the code appears by itself.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any
from unittest import mock

from docutils import nodes  # type: ignore[import-untyped]  # has no stubs of its own
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

# A name that several modules have is documented in the first of these, and a link everywhere else.
HOMES = (
    "deferlib.errors",
    "deferlib",
    "deferlib.deferred",
    "deferlib.taskqueue",
    "deferlib.namespaces",
    "deferlib.task_logs",
    "deferlib.testing",
    "deferlib.contrib.asgi",
)
# Methods without an underscore that only deferlib itself calls.
INTERNAL = frozenset({"of_call", "text", "of_error"})


# --- the API --------------------------------------------------------------------------------------------------------


def public_names(module: ModuleType) -> list[str]:
    """Return a module's public names: `__all__`, or what it defines itself without an underscore."""
    names = getattr(module, "__all__", None)
    if names is not None:
        return list(names)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


def home_of(value: object, name: str) -> str:
    """Return the full name under which *value*, known somewhere as *name*, is documented."""
    for home in HOMES:
        module = importlib.import_module(home)
        names = public_names(module)
        for known in (name, *names):  # its own name first: App Engine knows some by two
            if known in names and not _plain(value) and getattr(module, known) is value:
                return f"{home}.{known}"
    return ""


def _plain(value: object) -> bool:
    """Tell whether *value* is a number or the like, of which equal ones may be the same object."""
    return (
        not (inspect.isclass(value) or inspect.isroutine(value)) and type(value).__module__.partition(".")[0] != "deferlib"
    )


class Api(SphinxDirective):
    """Document a module's public names: those of the content in its order, then the rest."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()  # as all of these do: the code may have changed, though the page hasn't
        module = importlib.import_module(self.arguments[0])
        names = public_names(module)
        wanted = " ".join(self.content).split()
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise self.error(f"{module.__name__} has no public name {', '.join(unknown)}")
        lines, elsewhere = [f".. py:module:: {module.__name__}", ""], []
        for name in [*wanted, *(name for name in names if name not in wanted)]:
            value = getattr(module, name)
            full = f"{module.__name__}.{name}"
            if inspect.ismodule(value):  # a section of its own
                continue
            if home_of(value, name) not in ("", full):
                elsewhere.append((full, f":py:obj:`{home_of(value, name)}`"))
            else:
                lines += _entry(full, value)
        if elsewhere:
            lines += ["These are documented elsewhere on this page:", "", ".. list-table::", "   :header-rows: 1", ""]
            for left, right in [("name", "documented as"), *((f"``{full}``", link) for full, link in elsewhere)]:
                lines += [f"   * - {left}", f"     - {right}"]
        return _parsed(self, lines)


def _entry(full: str, value: object) -> list[str]:
    """Return the directives that document one name."""
    if inspect.isclass(value):
        options = ["members:", f"exclude-members: {', '.join(sorted(INTERNAL))}"]
        if issubclass(value, BaseException):
            options.append("show-inheritance:")
        elif getattr(value, "__annotations__", None) or value.__module__.startswith("deferlib.taskqueue"):
            options.append("undoc-members:")
        return [f".. autoclass:: {full}", *(f"   :{option}" for option in options), ""]
    if inspect.isroutine(value):
        return [f".. autofunction:: {full}", ""]
    if _plain(value):
        shown = str(value) if type(value).__module__ == "datetime" else repr(value)
        return [f".. py:data:: {full}", f"   :value: {shown}", ""]
    return [f".. py:data:: {full}", f"   :type: {type(value).__module__}.{type(value).__qualname__}", ""]


class NotYet(SphinxDirective):
    """List the names that this version answers with `NotAvailableError`, and what to do instead."""

    def run(self) -> list[nodes.Node]:
        import deferlib

        self.env.note_reread()
        return [
            _table(
                ("name", "instead"),
                [
                    ([nodes.literal(text=f"deferlib.{name}")], [nodes.Text(remedy)])
                    for name, remedy in deferlib._LATER.items()
                ],
            )
        ]


def comments_of_fields(cls: type) -> dict[str, str]:
    """Return the comment behind each field of *cls*, by the field's name: named tuples have no other place for it."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    (tree,) = ast.parse(source).body
    lines = source.splitlines()
    found = {}
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno:
            _, _, comment = lines[node.end_lineno - 1].partition("  # ")
            found[node.target.id] = comment.strip()
    return found


def describe_fields(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Put a field's own comment where Python says "Alias for field number 3"."""
    owner, _, field = name.rpartition(".")
    if lines and not re.match(r"Alias for field number \d+", lines[0]):
        return
    module, _, class_name = owner.rpartition(".")
    cls = getattr(importlib.import_module(module), class_name, None) if module.startswith("deferlib") else None
    if inspect.isclass(cls) and field in getattr(cls, "__annotations__", {}):
        comment = comments_of_fields(cls).get(field, "")
        lines[:] = [f"{comment[:1].upper()}{comment[1:]}."] if comment else []


def spell_out(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Write types in a signature by their names, where Python's repr of them would stand there."""
    if signature is None:
        return None
    signature = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", signature)
    if "~P" in signature:
        for shown, meant in (
            ("*args: ~typing.~P", "*args: P.args"),
            ("**kwargs: ~typing.~P", "**kwargs: P.kwargs"),
            ("[[~P], ", "[P, "),
            ("~collections.abc.", ""),
            ("~typing.", ""),
        ):
            signature = signature.replace(shown, meant)
    return signature, returns


def find_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Element) -> nodes.Element | None:
    """Link a bare name in a docstring, `TaskAlreadyExistsError`, to where it is documented, if there is only one such."""
    if node.get("refdomain") != "py" or not node.get("refdoc"):
        return None
    objects: dict[str, Any] = env.domains.python_domain.objects
    target = node["reftarget"]
    found = [name for name in objects if name == target or name.endswith(f".{target}")]
    found = [name for name in found if name.count(".") == min(each.count(".") for each in found)]
    if len(found) != 1 or app.builder is None:
        return None
    entry = objects[found[0]]
    reference = nodes.reference("", "", content, internal=True)
    reference["refuri"] = app.builder.get_relative_uri(node["refdoc"], entry.docname) + f"#{entry.node_id}"
    return reference


# --- settings -------------------------------------------------------------------------------------------------------


def setting_facts(name: str) -> list[tuple[str, str, bool]]:
    """Return what the code knows of a setting: what it is, the text, and whether it is code."""
    from deferlib.cli.settings import FLAGS
    from deferlib.settings import SETTINGS

    kind = SETTINGS[name]
    default = f"{kind.default:g}" if isinstance(kind.default, float) else str(kind.default or "")
    return [
        ("environment", f"DEFERLIB_{name.upper()}", True),
        ("command line", FLAGS.get(name, "none"), name in FLAGS),
        ("pyproject.toml, [tool.deferlib]", name, True),
        ("deferlib.configure()", f"{name}=", True),
        ("default", default or "none", bool(default)),
        ("allowed", kind.allowed, False),
    ]


class SettingFacts(SphinxDirective):
    """State the facts of one setting."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        rows = [
            ([nodes.Text(what)], [nodes.literal(text=text) if code else nodes.Text(text)])
            for what, text, code in setting_facts(self.arguments[0])
        ]
        return [_table(None, rows)]


# --- limits ---------------------------------------------------------------------------------------------------------


def limit_rows() -> list[tuple[str, str, str, str, str]]:
    """Return a row for each limit: name, what it is, both profiles' values, how far it can be moved."""
    from deferlib.limits import TABLE

    return [
        (name, limit.what, f"{limit.appengine:,}", f"{limit.deferlib:,}", f"{limit.least:,} to {limit.most:,}")
        for name, limit in TABLE.items()
    ]


class LimitTable(SphinxDirective):
    """State every limit."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        head = ("limit", "what", "appengine", "deferlib", "allowed")
        rows = [([nodes.literal(text=name)], *([nodes.Text(text)] for text in texts)) for name, *texts in limit_rows()]
        return [_table(head, rows)]


# --- commands -------------------------------------------------------------------------------------------------------


def commands(parser: argparse.ArgumentParser | None = None) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield every command, `deferlib tasks list`, with its parser, depth first."""
    if parser is None:
        from deferlib.cli import _parser

        parser = _parser()
    yield parser.prog, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from commands(child)


def help_of(parser: argparse.ArgumentParser) -> str:
    """Return a command's help as it is printed in a terminal of 80 columns."""
    with mock.patch.dict(os.environ, {"COLUMNS": "80", "NO_COLOR": "1"}):
        return parser.format_help().rstrip()


class Commands(SphinxDirective):
    """Print the help of every command, each in a section of its own."""

    def run(self) -> list[nodes.Node]:
        self.env.note_reread()
        sections = []
        for name, parser in commands():
            section = nodes.section(ids=[nodes.make_id(name)], names=[nodes.fully_normalize_name(name)])
            section += nodes.title("", "", nodes.literal(text=name))
            section += nodes.literal_block(text=help_of(parser), language="text")
            self.state.document.note_explicit_target(section, section)
            sections.append(section)
        return sections


# --- docutils -------------------------------------------------------------------------------------------------------


def _parsed(directive: SphinxDirective, lines: list[str]) -> list[nodes.Node]:
    """Parse *lines* as reStructuredText, the language of docstrings, whatever that of the page is."""
    return directive.parse_text_to_nodes("\n".join(["```{eval-rst}", *lines, "```"]))


def _table(head: tuple[str, ...] | None, rows: Sequence[tuple[list[nodes.Node], ...]]) -> nodes.table:
    """Return a table of *rows*, each a tuple of cells, each a list of inline nodes."""
    width = len(rows[0])
    group = nodes.tgroup(cols=width)
    group += [nodes.colspec(colwidth=1) for _ in range(width)]
    if head is not None:
        group += nodes.thead("", _row([[nodes.Text(text)] for text in head]))
    group += nodes.tbody("", *[_row(list(row)) for row in rows])
    return nodes.table("", group, classes=["colwidths-auto"])


def _row(cells: list[list[nodes.Node]]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells])


def setup(app: Sphinx) -> dict[str, Any]:
    """Add the directives to Sphinx."""
    app.add_directive("api", Api)
    app.add_directive("not-yet", NotYet)
    app.add_directive("setting", SettingFacts)
    app.add_directive("limits", LimitTable)
    app.add_directive("cli", Commands)
    app.connect("autodoc-process-docstring", describe_fields)
    app.connect("autodoc-process-signature", spell_out)
    app.connect("missing-reference", find_short_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
