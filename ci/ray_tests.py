"""Pytest plugin that deselects the tests that ci/ray_tests.txt lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_suffix(".txt")


def left_out() -> dict[str, str]:
    """Return the excluded tests with their reasons."""
    lines = [line for line in LIST.read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split(": ", 1) for line in lines)


def reason_for(name: str, listed: dict[str, str]) -> str | None:
    """Return why a test ``file.py::test[parameters]`` is excluded, or None if it runs."""
    for entry, reason in listed.items():
        if name == entry or name.startswith((f"{entry}[", f"{entry}::")):
            return reason
    return None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if collection_path.name in left_out() else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> None:
    listed = left_out()
    names = {item: f"{item.path.name}::{item.nodeid.partition('::')[2]}" for item in items}
    out = [item for item in items if reason_for(names[item], listed) is not None]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]
