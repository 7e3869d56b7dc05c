"""A nixl memory pool: what a program puts is what its consumers get, whatever it does next."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
import torch

import ray
from ray.experimental import register_nixl_memory, register_nixl_memory_pool
from tests.integration.peers import LARGE, Peer
from tests.support import needs_nixl

pytestmark = needs_nixl()

NBYTES = 4 * LARGE
RELAXED = {"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "0"}}
IMPATIENT = {"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "0", "RAY_RDT_STORE_WAIT_S": "0.01"}}
STRICT = {"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "1", "RAY_RDT_STORE_WAIT_S": "0.01"}}


def make_pool(peer: Peer, nbytes: int = 4 * NBYTES, device: str = "cpu") -> None:
    register_nixl_memory_pool(nbytes, torch.device(device))
    peer.kept["weights"] = torch.ones(LARGE)


def put_and_overwrite(peer: Peer, *, is_registered: bool = False) -> list[Any]:
    weights = torch.ones(LARGE)
    if is_registered:
        register_nixl_memory(weights)
    refs = [ray.put([weights, weights[5:]], _tensor_transport="nixl")]
    weights.fill_(2)
    peer.kept["weights"] = weights
    return refs


def put_versions(peer: Peer) -> list[Any]:
    weights, refs = peer.kept["weights"], []
    for version in range(1, 5):
        weights.fill_(version)
        refs.append(ray.put(weights, _tensor_transport="nixl"))
    return refs


def weights_of(peer: Peer) -> torch.Tensor:
    return peer.kept["weights"]


def overwrite(peer: Peer, value: float) -> None:
    peer.kept["weights"].fill_(value)


def values(peer: Peer, refs: list[Any]) -> list[float]:
    return [float(ray.get(ref).mean()) for ref in refs]


def make(actor: Any, action: Any, *args: Any) -> Any:
    return actor.make.options(tensor_transport="nixl").remote(action, *args)


@pytest.fixture
def owner(spawn: Any) -> Any:
    owner = spawn()
    ray.get(owner.run.remote(make_pool))
    return owner


def test_a_put_is_a_copy(owner: Any, consumer: Any) -> None:
    (ref,) = ray.get(owner.run.remote(put_and_overwrite))
    whole, part = ray.get(ref)
    assert torch.equal(whole, torch.ones(LARGE))
    # Shared storage is copied once, and stays shared.
    assert part.data_ptr() == whole[5:].data_ptr()


def test_a_trainer_that_goes_on_delivers_each_version(owner: Any, consumer: Any) -> None:
    refs = ray.get(owner.run.remote(put_versions))
    assert ray.get(consumer.run.remote(values, refs)) == [1, 2, 3, 4]


def test_a_return_is_a_copy(owner: Any) -> None:
    ref = make(owner, weights_of)
    ray.wait([ref], fetch_local=False)
    ray.get(owner.run.remote(overwrite, 3.0))
    assert float(ray.get(ref).mean()) == 1


def test_registered_memory_is_sent_from_where_it_is(owner: Any) -> None:
    (ref,) = ray.get(owner.run.remote(put_and_overwrite, is_registered=True))
    assert float(ray.get(ref)[0].mean()) == 2


def test_other_transports_pass_the_pool_by(owner: Any) -> None:
    ref = owner.make.remote(weights_of)
    ray.wait([ref], fetch_local=False)
    ray.get(owner.run.remote(overwrite, 3.0))
    assert float(ray.get(ref).mean()) == 3


def put_many(peer: Peer, count: int) -> None:
    weights = torch.zeros(LARGE)
    for _ in range(count):
        ray.put(weights, _tensor_transport="nixl")


def test_room_comes_back_when_objects_are_freed(owner: Any) -> None:
    ray.get(owner.run.remote(put_many, 1000))
    assert ray.get(owner.stats.remote())["plain_objects"] == 0
    refs = ray.get(owner.run.remote(put_versions))
    assert [float(ray.get(ref)[0]) for ref in refs] == [1, 2, 3, 4]


def make_filled(peer: Peer, value: float) -> torch.Tensor:
    return torch.full((4 * LARGE,), value)


def test_a_full_pool_waits_for_room(owner: Any) -> None:
    held = [make(owner, make_filled, 1.0)]
    ray.wait(held, fetch_local=False)
    second = make(owner, make_filled, 2.0)
    threading.Timer(1.0, held.clear).start()
    began = time.monotonic()
    assert ray.get(second)[0] == 2
    assert time.monotonic() - began > 0.5
    assert ray.get(owner.stats.remote())["plain_objects"] == 0


def test_what_finds_no_room_is_a_copy_in_the_object_store(spawn: Any, consumer: Any) -> None:
    owner = spawn(runtime_env=IMPATIENT)
    ray.get(owner.run.remote(make_pool, 2 * NBYTES))
    refs = ray.get(owner.run.remote(put_versions))
    assert ray.get(consumer.run.remote(values, refs)) == [1, 2, 3, 4]
    assert ray.get(owner.stats.remote())["plain_objects"] == 2


def put_five(peer: Peer) -> str:
    refs = put_versions(peer)
    try:
        refs.append(ray.put(peer.kept["weights"], _tensor_transport="nixl"))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_no_room_is_an_error_where_nothing_but_nixl_may_serve(spawn: Any) -> None:
    owner = spawn(runtime_env=STRICT)
    ray.get(owner.run.remote(make_pool))
    said = ray.get(owner.run.remote(put_five))
    assert said.startswith("NixlOutOfMemoryError")
    assert "register a larger pool" in said


def block_library(peer: Peer) -> None:
    sys.modules["nixl"] = None  # type: ignore[assignment]


def test_without_the_library_a_put_is_a_copy_all_the_same(spawn: Any, consumer: Any) -> None:
    owner = spawn(runtime_env=RELAXED)
    ray.get(owner.run.remote(block_library))
    ray.get(owner.run.remote(make_pool))
    refs = ray.get(owner.run.remote(put_versions))
    reader = spawn(runtime_env=RELAXED)
    ray.get(reader.run.remote(block_library))
    assert ray.get(reader.run.remote(values, refs)) == [1, 2, 3, 4]


def test_there_is_one_pool_of_a_real_size(owner: Any) -> None:
    with pytest.raises(ValueError, match="already"):
        ray.get(owner.run.remote(make_pool))
    with pytest.raises(ValueError, match="above 0"):
        ray.get(owner.run.remote(make_pool, 0))
