"""The pytest plugin: the fixture `deferlib_engine`.

Loaded in every project that has deferlib installed, so it imports nothing until the fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from deferlib.testing.harness import Harness


@pytest.fixture
def deferlib_app() -> Any:
    """The WSGI app that tasks with a URL of their own are for. Override it in your conftest.py."""
    return None


@pytest.fixture
def deferlib_engine(deferlib_app: Any) -> Iterator[Harness]:
    """A deferlib engine on a virtual clock; see `deferlib.testing.engine`."""
    from deferlib.testing.harness import engine

    with engine(deferlib_app) as harness:
        yield harness
