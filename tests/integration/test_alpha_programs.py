"""What programs written for Ray's alpha reach for, called as they call it."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import pytest
import torch

import ray
from ray.experimental import (
    register_nixl_memory,
    register_nixl_memory_pool,
    register_tensor_transport,
    set_target_for_ref,
)
from ray.experimental.collective import (
    create_collective_group,
    destroy_collective_group,
    get_collective_groups,
)
from ray.experimental.rdt.util import get_tensor_transport_manager
from tests.integration.alpha_transports import CALLS, FolderTransport, register_backend
from tests.integration.peers import LARGE, Peer
from tests.support import needs_nixl, wait_until


@functools.cache
def register() -> None:
    register_backend()
    register_tensor_transport("FOLDER", ["cpu"], FolderTransport, torch.Tensor)


@pytest.fixture
def members(spawn: Any) -> list[Any]:
    register()
    members = [spawn(), spawn()]
    ray.get([member.run.remote(lambda peer: register_backend()) for member in members])
    return members


def make(peer: Peer, value: float) -> list[torch.Tensor]:
    return [torch.full((LARGE,), value), torch.tensor([value])]


def total(peer: Peer, tensors: list[torch.Tensor]) -> float:
    return float(sum(tensor.sum() for tensor in tensors))


def calls(peer: Peer) -> dict[str, int]:
    return dict(CALLS)


def test_a_subclass_of_the_collective_transport_uses_its_own_groups(members: list[Any]) -> None:
    maker, taker = members
    group = create_collective_group(members, backend="folder")
    assert [found.name for found in get_collective_groups(members, "FOLDER")] == [group.name]
    for value in (1.0, 2.0):
        ref = maker.make.options(tensor_transport="folder").remote(make, value)
        assert ray.get(taker.run.remote(total, ref)) == value * (LARGE + 1)
    assert ray.get(taker.run.remote(calls))["received"] == 2
    destroy_collective_group(group)
    wait_until(lambda: ray.get(maker.run.remote(calls)).get("destroyed") == 1)
    assert get_collective_groups(members) == []


def test_a_backend_that_nobody_registered_is_an_error(members: list[Any]) -> None:
    for unknown in ("none", "RDT"):
        with pytest.raises(ValueError, match="Unknown backend"):
            create_collective_group(members, backend=unknown)


def register_rows(peer: Peer) -> tuple[str, float]:
    """As Ray's benchmark of weight transfer measures registration."""
    transport: Any = get_tensor_transport_manager("NIXL")
    agent = transport.get_nixl_agent()
    weights = torch.ones(8, 4096)
    for registered in [agent.register_memory(row) for row in weights]:
        agent.deregister_memory(registered)
    transport.register_nixl_memory(weights)
    ref = ray.put(list(weights), _tensor_transport="nixl")
    total = float(sum(row.sum() for row in ray.get(ref)))
    assert transport._get_meta(ref.hex()) is None
    return transport._backend, total


def describe(peer: Peer) -> Any:
    peer.kept["tensors"] = [torch.arange(LARGE), torch.ones(3, 4), torch.tensor(True)]
    return get_tensor_transport_manager("NIXL").extract_tensor_transport_metadata(
        "id", peer.kept["tensors"]
    )


def receive(peer: Peer, metadata: Any) -> list[torch.Tensor]:
    transport = get_tensor_transport_manager("NIXL")
    return transport.recv_multiple_tensors(
        "id", metadata, transport.get_communicator_metadata(None, None)
    )


def collect(peer: Peer, metadata: Any) -> None:
    transport = get_tensor_transport_manager("NIXL")
    transport.garbage_collect("id", metadata, peer.kept["tensors"])


@needs_nixl()
def test_the_nixl_transport_and_its_agent(producer: Any, consumer: Any) -> None:
    assert ray.get(producer.run.remote(register_rows)) == ("UCX", 8 * 4096)
    metadata = ray.get(producer.run.remote(describe))
    received = ray.get(consumer.run.remote(receive, metadata))
    assert torch.equal(received[0], torch.arange(LARGE))
    assert torch.equal(received[1], torch.ones(3, 4))
    assert received[2].item() is True
    ray.get(producer.run.remote(collect, metadata))


@ray.remote(num_cpus=0, enable_tensor_transport=True)
class Trainer:
    """As in Ray's own example of weight transfer: puts into a pool, and steps on."""

    def __init__(self, rows: int, length: int):
        self.weights = torch.zeros(rows, length, dtype=torch.float16)
        register_nixl_memory_pool(2 * self.weights.nbytes, torch.device("cpu"))

    async def loop(self, generators: list[Any], steps: int) -> None:
        for version in range(1, steps + 1):
            self.weights += 1
            refs = [ray.put(list(self.weights), _tensor_transport="nixl")]
            synced = [actor.sync.remote(version, refs) for actor in generators]
            del refs
            await asyncio.gather(*synced)


@ray.remote(num_cpus=0, enable_tensor_transport=True)
class Generator:
    """Registers its weights once, and receives into them."""

    def __init__(self, rows: int, length: int):
        self.weights = torch.zeros(rows, length, dtype=torch.float16)
        register_nixl_memory(self.weights)

    async def sync(self, version: int, refs: list[Any]) -> None:
        (ref,) = refs
        set_target_for_ref(ref, list(self.weights))
        ray.get(ref)
        assert torch.all(self.weights == version)


@needs_nixl()
def test_weights_go_through_a_pool_into_registered_weights(spawn: Any) -> None:
    shape = 64, 8192
    generators = [spawn(Generator, *shape), spawn(Generator, *shape)]
    ray.get(spawn(Trainer, *shape).loop.remote(generators, 6))
