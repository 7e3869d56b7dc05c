"""A pytest plugin: Ray's own RDT tests without those that ci/ray_tests.txt names.

Ray's file for gloo also marks a method of an actor with a concurrency group of Ray's RDT, which is
not there; Ray refuses such an actor. So the plugin takes the mark off.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

LIST = Path(__file__).with_suffix(".txt")

#: The concurrency group on which Ray's own RDT does its transfers.
RAYS_GROUP = "_ray_system"


def left_out() -> dict[str, str]:
    """The list: what is left out, and why."""
    lines = [line for line in LIST.read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split(": ", 1) for line in lines)


def reason_for(name: str, listed: dict[str, str]) -> str | None:
    """Why a test, named as ``file.py::test[parameters]``, is left out; None if it is not."""
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


def pytest_configure(config: pytest.Config) -> None:
    import ray

    method = ray.method

    def without_rays_group(*args: Any, **options: Any) -> Any:
        if options.get("concurrency_group") == RAYS_GROUP:
            del options["concurrency_group"]
        return method(*args, **options) if args or options else lambda function: function

    ray.method = without_rays_group
