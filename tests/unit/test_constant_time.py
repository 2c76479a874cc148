"""Secrets are compared in constant time, and SQL has no text of anybody's in it: read from the code itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "deferlib"
_COMPARISONS = (ast.Eq, ast.NotEq, ast.In, ast.NotIn)
# Names of secrets, and of what is computed from them. Ids of keys are public.
_SECRET = re.compile(r"(?i)(^|_)(signature|signed_by|digest|hmac|mac|secret|password|token|expected|hexdigest)s?$")
_SQL = re.compile(
    r"(?i)\b(select\b.+\bfrom|insert\s+into|update\b.+\bset|delete\s+from|create\s+(table|index)|drop\s+table)\b"
)
# What has such a name and is compared all the same, by file and name, each with its reason.
ALLOWED = {
    ("contrib/asgi.py", "_SIGNATURE"): "the name of the header",
    ("queue_rows.py", "_FILE_DIGEST"): "the digest of queue.yaml, which is no secret",
    ("cli/key_file.py", "expected"): "whoever runs the command reads the file anyway",
}


def modules() -> Iterator[Path]:
    return (path for path in sorted(PACKAGE.rglob("*.py")) if "__pycache__" not in path.parts)


def names_in(node: ast.expr) -> Iterator[str]:
    """Return the names that the value of *node* goes by: its own, and those of what is called for it."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield name
        case ast.Call(func=function, args=arguments):
            yield from names_in(function)
            if isinstance(function, ast.Attribute):
                yield from names_in(function.value)
            if not isinstance(function, ast.Name) or function.id not in ("len", "type", "isinstance", "bool"):
                for argument in arguments:
                    yield from names_in(argument)
        case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
            yield key
            yield from names_in(value)
        case ast.Subscript(value=value) | ast.Await(value=value):
            yield from names_in(value)
        case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
            for element in elements:
                yield from names_in(element)


def is_empty(node: ast.expr) -> bool:
    """Tell whether *node* is a constant, which is no secret: an empty string, None, a number."""
    return isinstance(node, ast.Constant)


def hasty_comparisons(source: str) -> list[tuple[set[str], str]]:
    """Return the secrets that are compared in *source* so that it takes longer the more of them is right, and where."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            for left, operator, right in pairs:
                if not isinstance(operator, _COMPARISONS) or is_empty(left) or is_empty(right):
                    continue
                if names := {name for side in (left, right) for name in names_in(side) if _SECRET.search(name)}:
                    found.append((names, f"{node.lineno}: {ast.unparse(node)}"))
        elif isinstance(node, ast.Match) and (names := {name for name in names_in(node.subject) if _SECRET.search(name)}):
            found.append((names, f"{node.lineno}: match {ast.unparse(node.subject)}"))
    return found


def made_up_sql(source: str) -> list[tuple[int, str]]:
    """Return the SQL in *source* that isn't one constant text."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.JoinedStr(values=parts) if any(isinstance(part, ast.FormattedValue) for part in parts):
                text = "".join(str(part.value) if isinstance(part, ast.Constant) else "x" for part in parts)
            case ast.BinOp(op=ast.Mod() | ast.Add(), left=left, right=right):
                text = " ".join(str(side.value) for side in (left, right) if isinstance(side, ast.Constant))
            case ast.Call(func=ast.Attribute(attr="format" | "replace", value=ast.Constant(value=str(text)))):
                pass
            case _:
                continue
        if _SQL.search(text.replace("\n", " ")):
            found.append((node.lineno, ast.unparse(node)))
    return found


def test_no_secret_is_compared_byte_by_byte() -> None:
    found = [
        f"{file}:{text}" for file, names, text in hasty_everywhere() if not any((file, name) in ALLOWED for name in names)
    ]

    assert found == []


def test_every_exception_is_needed() -> None:
    used = {(file, name) for file, names, _ in hasty_everywhere() for name in names}

    assert set(ALLOWED) <= used


def hasty_everywhere() -> Iterator[tuple[str, set[str], str]]:
    for path in modules():
        for names, text in hasty_comparisons(path.read_text(encoding="utf-8")):
            yield str(path.relative_to(PACKAGE)), names, text


def test_no_sql_is_put_together() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{line}": text
        for path in modules()
        for line, text in made_up_sql(path.read_text(encoding="utf-8"))
    }

    assert found == {}


def test_both_trust_lines_compare_in_constant_time() -> None:
    for name in ("token.py", "payload.py"):
        assert "hmac.compare_digest(" in (PACKAGE / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "planted",
    [
        "if signature == expected: pass",
        "if envelope.signature != hmac.digest(key, data, 'sha256'): pass",
        "ok = hashlib.sha256(body).hexdigest() == claims['b']",
        "ok = expected.hex() in given",
        "ok = token in tokens",
        "ok = claims['signature'] == x",
        "ok = a < 1 and self._password == given",
        "match signature:\n    case b'': pass",
    ],
)
def test_planted_comparison_is_found(planted: str) -> None:
    assert hasty_comparisons(planted)


@pytest.mark.parametrize(
    "harmless", ["if signature == '': pass", "len(token) == 3", "key_id == other.key_id", "a in names"]
)
def test_harmless_comparison_is_not(harmless: str) -> None:
    assert not hasty_comparisons(harmless)


@pytest.mark.parametrize(
    "planted",
    [
        "db.execute(f'select * from tasks where name = {name}')",
        "db.execute('delete from %s' % table)",
        "db.execute('insert into ' + table)",
        "db.execute('update tasks set {} = 1'.format(column))",
        "db.execute(f'''select id\n from {table}''')",
    ],
)
def test_planted_sql_is_found(planted: str) -> None:
    assert made_up_sql(planted)
