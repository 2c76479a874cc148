"""One fixture: the store, once for every database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from deferlib.store import Store
from tests.store.stores import FACTORIES, open_store


@pytest.fixture(params=list(FACTORIES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    store = open_store(FACTORIES[request.param], tmp_path)
    yield store
    store.close()
