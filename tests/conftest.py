"""How two workers share the tests (`make test`): by file, but what starts servers and engines comes one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

ALONE = {Path(__file__).parent, Path(__file__).parent / "system"}  # what they start has both cores, or nearly


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            group = "processes" if item.path.parent in ALONE else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
