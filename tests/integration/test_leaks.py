"""Along every path, many objects leave nothing behind. ``python -m ci.leaks`` does it with more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ray
from ci import leaks

OBJECTS = 100


@pytest.fixture(scope="module")
def world(local_ray: None) -> Iterator[leaks.World]:
    world = leaks.World()
    yield world
    for actor in (world.one, world.two, world.loop):
        ray.kill(actor)


@pytest.mark.parametrize("path", leaks.PATHS, ids=lambda name: name.replace(" ", "-"))
def test_nothing_is_left_behind(world: leaks.World, path: str) -> None:
    assert leaks.run(world, leaks.PATHS[path], OBJECTS) == []


def test_what_is_left_behind_is_seen(world: leaks.World) -> None:
    kept: list[Any] = []

    def keep(world: leaks.World, count: int) -> None:
        kept.extend(ray.put(torch.ones(3), _tensor_transport="auto") for _ in range(count))

    assert any("stored_objects" in left for left in leaks.run(world, keep, 4, limit_s=1))
