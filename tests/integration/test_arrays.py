"""With RAY_RDT_ARRAY_BYTES at the producer, its arrays stay there as tensors do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import ray
from tests.integration.peers import LARGE, Peer


@pytest.fixture(scope="module")
def maker(local_ray: None) -> Iterator[Any]:
    actor = Peer.options(runtime_env={"env_vars": {"RAY_RDT_ARRAY_BYTES": "1000"}}).remote()
    yield actor
    ray.kill(actor)


def arrays(peer: Any) -> dict[str, Any]:
    made = {"large": np.arange(LARGE).reshape(-1, 16), "small": np.arange(3), "text": "x"}
    if peer is not None:
        peer.kept["made"] = made
    return made


def check(_: Any, got: dict[str, Any]) -> bool:
    got["large"][0, 0] += 0  # the consumer's own
    return all(np.array_equal(got[name], value) for name, value in arrays(None).items())


def test_arrays_of_a_method(maker: Any, consumer: Any, transport: str) -> None:
    ref = maker.make.options(tensor_transport=transport).remote(arrays)
    assert ray.get(consumer.run.remote(check, ref))
    assert ray.get(maker.stats.remote())["stored_objects"] == 1
    assert check(None, ray.get(ref))


def test_arrays_of_a_task(consumer: Any, transport: str) -> None:
    @ray.remote(num_cpus=1, runtime_env={"env_vars": {"RAY_RDT_ARRAY_BYTES": "1000"}})
    def make() -> dict[str, Any]:
        return arrays(None)

    ref = make.options(tensor_transport=transport).remote()
    assert ray.get(consumer.run.remote(check, ref))


def test_where_it_was_made_it_is_the_same_memory(maker: Any) -> None:
    def is_mine(peer: Peer, got: dict[str, Any]) -> bool:
        return np.shares_memory(got["large"], peer.kept["made"]["large"])

    assert ray.get(maker.run.remote(is_mine, maker.make.remote(arrays)))


def test_without_the_setting_arrays_are_plain_values(producer: Any) -> None:
    before = ray.get(producer.stats.remote())["stored_objects"]
    ref = producer.make.remote(arrays)
    assert check_plain(ray.get(ref))
    assert ray.get(producer.stats.remote())["stored_objects"] == before


def check_plain(got: dict[str, Any]) -> bool:
    return not got["large"].flags.writeable and np.array_equal(got["large"], arrays(None)["large"])
