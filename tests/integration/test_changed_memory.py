"""What becomes of an object whose tensors' memory is freed, resized or replaced by its producer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import ray
from tests.integration.conftest import needs_nixl
from tests.integration.peers import LANES, LARGE, Peer, ones, total

#: Large enough for the allocator to give its memory back to the system at once.
MAPPED = 10 << 20

CHANGED = r"storage .* was freed, resized or moved"


class Way(NamedTuple):
    """A transport, and a consumer that reaches the producer by one lane of it."""

    transport: str
    consumer: Any


@pytest.fixture(params=[*LANES, "gloo", pytest.param("nixl", marks=needs_nixl()), "pipe"])
def way(
    request: pytest.FixtureRequest, takers: dict[str, Any], consumer: Any, users_transports: None
) -> Way:
    lane = str(request.param)
    if lane in takers:
        return Way("auto", takers[lane])
    return Way(lane, consumer)


def keep(peer: Peer, count: int) -> torch.Tensor:
    peer.kept["t"] = torch.arange(count, dtype=torch.float32)
    return peer.kept["t"]


def make_kept(producer: Any, transport: str, count: int) -> Any:
    ref = producer.make.options(tensor_transport=transport).remote(keep, count)
    ray.wait([ref])
    return ref


def resize(factor: float) -> Callable[[Peer], None]:
    def change(peer: Peer) -> None:
        storage = peer.kept["t"].untyped_storage()
        storage.resize_(int(storage.nbytes() * factor))
        # Other data takes the place of what was freed.
        peer.kept["other"] = [torch.zeros(LARGE) for _ in range(8)]

    return change


@pytest.mark.parametrize("count", [LARGE + 17, MAPPED], ids=["heap", "mapped"])
@pytest.mark.parametrize("factor", [0, 0.5, 2], ids=["freed", "shrunk", "grown"])
def test_a_storage_that_was_resized_is_the_objects_error(
    producer: Any, way: Way, count: int, factor: float
) -> None:
    ref = make_kept(producer, way.transport, count)
    pid = ray.get(producer.pid.remote())
    ray.get(producer.run.remote(resize(factor)))
    with pytest.raises(ray.exceptions.RayError, match=CHANGED):
        ray.get(way.consumer.run.remote(total, ref), timeout=60)
    assert ray.get(producer.run.remote(lambda peer: peer.kept["t"].untyped_storage().nbytes())) == (
        int(count * 4 * factor)
    )
    assert ray.get(producer.pid.remote()) == pid
    ones_ref = producer.make.options(tensor_transport=way.transport).remote(ones)
    assert ray.get(way.consumer.run.remote(total, ones_ref)) == LARGE


def test_a_resized_storage_with_checksums(producer: Any, spawn: Any) -> None:
    taker = spawn(Peer, runtime_env={"env_vars": {"RAY_RDT_CHECKSUM": "1"}})
    ref = make_kept(producer, "auto", MAPPED)
    ray.get(producer.run.remote(resize(0)))
    with pytest.raises(ray.exceptions.RayError, match=CHANGED):
        ray.get(taker.run.remote(total, ref), timeout=60)


def test_a_resized_storage_of_an_object_that_was_made_here(producer: Any) -> None:
    def get_into(_: Peer, refs: list[Any]) -> None:
        target = torch.zeros(MAPPED)
        ray.experimental.set_target_for_ref(refs[0], [target])
        ray.get(refs[0])

    ref = make_kept(producer, "auto", MAPPED)
    ray.get(producer.run.remote(resize(0)))
    with pytest.raises(ray.exceptions.RayError, match=CHANGED):
        ray.get(producer.run.remote(get_into, [ref]))


@pytest.mark.parametrize(
    "replace",
    [
        lambda tensor: setattr(tensor, "data", torch.zeros(7)),
        lambda tensor: tensor.set_(torch.zeros(7)),
        lambda tensor: torch.utils.swap_tensors(tensor, torch.zeros(7)),
    ],
    ids=["data", "set_", "swap"],
)
def test_an_object_is_the_memory_that_was_returned(
    producer: Any, way: Way, replace: Callable[[torch.Tensor], None]
) -> None:
    """A tensor that gets other memory, as ``module.half()`` does, leaves the object as it is."""

    def change(peer: Peer) -> None:
        replace(peer.kept["t"])
        peer.kept["other"] = [torch.zeros(LARGE) for _ in range(8)]

    ref = make_kept(producer, way.transport, MAPPED)
    ray.get(producer.run.remote(change))
    expected = torch.arange(MAPPED, dtype=torch.float32)
    assert ray.get(
        way.consumer.run.remote(lambda _, got, want: torch.equal(got, want), ref, expected)
    )
