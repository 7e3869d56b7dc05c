"""One local Ray for all of the folder, and processes that outlive the faults of each test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import ray
from tests.chaos.faults import assert_exchange
from tests.integration.conftest import consumer, local_ray, producer, spawn, users_transports
from tests.integration.peers import LANE_SETTINGS, LANES, Peer

__all__ = ["consumer", "local_ray", "producer", "spawn", "users_transports"]


@pytest.fixture(scope="package")
def takers(local_ray: None) -> dict[str, Any]:
    """Consumers that use one lane each, and can be told something while they fetch."""
    return {
        lane: Peer.options(
            max_concurrency=3, runtime_env={"env_vars": {"RAY_RDT_LANES": setting}}
        ).remote()
        for lane, setting in LANE_SETTINGS.items()
    }


@pytest.fixture(params=LANES)
def taker(request: pytest.FixtureRequest, takers: dict[str, Any]) -> Any:
    """The consumer of each lane in turn."""
    return takers[request.param]


@pytest.fixture(scope="package")
def huge(producer: Any) -> Any:
    """An object of 1 GiB, the numbers from 0."""
    ref = producer.make.remote(lambda _: count(1 << 28))
    ray.wait([ref], fetch_local=False)
    return ref


def count(length: int) -> Any:
    import torch

    return torch.arange(length, dtype=torch.int32)


@pytest.fixture(autouse=True)
def the_others_go_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each fault the processes that are left exchange objects, with no call by the user."""
    names = ["producer", "consumer", *({"taker"} & set(request.fixturenames))]
    actors = [request.getfixturevalue(name) for name in names]
    yield
    assert_exchange(actors)
