"""Imports point downward only: the layers of docs/internals/architecture.md, read from the code itself."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "deferlib"

# From the bottom up; a package's modules are its layer unless they stand on their own.
LAYERS = [
    {"core"},
    {"clock", "disassembly", "limits", "outbound", "owners", "secret_names", "targets"},
    {"context", "keys", "moved", "namespaces", "ids", "queue_fields", "queue_yaml", "task_logs", "tracing"},
    {"batch", "payload", "token", "store"},
    {"settings", "queue_rows"},
    {"config", "call_text"},
    {"deadline"},
    {"taskqueue"},
    {"access", "inbound", "checkup", "series"},
    {"attempt"},
    {"deferred"},
    {"server"},
    {"contrib.calls", "contrib.outside"},
    {"contrib.asgi"},  # the engine takes ASGI apps through it
    {"engine"},
    {"testing", "contrib", "cli"},
]
PURE_FORBIDDEN = {"time", "socket", "threading", "logging", "asyncio", "os", "select", "subprocess", "secrets", "apsw"}
STORES = {
    "store.sqlite",
    "store.sqlite_tx",
    "store.sqlite_statements",
    "store.sqlite_seat",
    "store.sqlite_file",
    "store.sqlite_log",
    "store.sqlite_forks",
    "store.checkpointer",
    "store.datagram",
    "store.postgres",
}


@cache
def modules() -> list[tuple[str, ast.Module]]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found.append((name, ast.parse(path.read_text(encoding="utf-8"))))
    return found


def imports(tree: ast.AST) -> set[str]:
    """Return the dotted names imported anywhere in *tree*, but not those imported for the type checker only."""
    names: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        names |= imports(node)
    return names


def layer(module: str) -> int | None:
    parts = module.split(".")
    for number, names in reversed(list(enumerate(LAYERS))):
        if any(module == name or module.startswith(f"{name}.") for name in names if "." in name):
            return number
    return next((number for number, names in enumerate(LAYERS) if parts[0] in names), None)


def own(names: set[str]) -> set[str]:
    """Return the modules of deferlib among *names*, without the package itself and what isn't a module."""
    known = {name for name, _ in modules()} - {"__init__"}
    return {name.removeprefix("deferlib.") for name in names} & known


@pytest.mark.parametrize(("name", "tree"), [pytest.param(*module, id=module[0]) for module in modules()])
def test_imports_point_downward(name: str, tree: ast.Module) -> None:
    if name in ("__init__", "errors"):
        assert name == "__init__" or not own(imports(tree))
        return
    here = layer(name)
    assert here is not None, f"deferlib.{name} has no layer: give it one"

    for imported in own(imports(tree)) - {"errors"}:
        there = layer(imported)
        assert there is not None
        assert there <= here, f"deferlib.{name} (layer {here}) imports deferlib.{imported} (layer {there})"


@pytest.mark.parametrize(("name", "tree"), [pytest.param(*module, id=module[0]) for module in modules()])
def test_only_connect_knows_the_databases(name: str, tree: ast.Module) -> None:
    if name == "config" or name in STORES:
        return

    assert not own(imports(tree)) & STORES


@pytest.mark.parametrize(
    ("name", "tree"), [pytest.param(*module, id=module[0]) for module in modules() if module[0].startswith("core")]
)
def test_core_has_no_clock_socket_thread_or_logger(name: str, tree: ast.Module) -> None:
    assert not {imported.partition(".")[0] for imported in imports(tree)} & PURE_FORBIDDEN


def test_no_room_without_a_story() -> None:
    assert not {name.rpartition(".")[2] for name, _ in modules()} & {"utils", "util", "common", "helpers", "misc"}
