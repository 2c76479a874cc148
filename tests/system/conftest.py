"""The site that every system test works on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deferlib import config
from tests.system.processes import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    site.runtime()
    yield site
    config.runtime().close()
    config.install(None)
    sys.modules.pop("systemapp", None)
    importlib.invalidate_caches()
