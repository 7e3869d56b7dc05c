"""Views that leave out most of the bytes that they span, as blocks of a layers-first cache do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ray
from tests.integration.conftest import needs_nixl
from tests.integration.peers import LANES, Peer
from tests.unit import values

LAYERS, BLOCKS, BLOCK = 16, 64, (2, 8, 256)
#: Of one block in all layers: 256 KiB of 16 MiB.
NBYTES = LAYERS * 2 * 8 * 256 * 2


@pytest.fixture(params=[*LANES, "gloo", pytest.param("nixl", marks=needs_nixl()), "files"])
def way(
    request: pytest.FixtureRequest, takers: dict[str, Any], consumer: Any, users_transports: None
) -> tuple[str, Any]:
    """A transport, and a consumer that reaches the producer by one lane of it."""
    lane = str(request.param)
    return ("auto", takers[lane]) if lane in takers else (lane, consumer)


def make_cache(peer: Peer | None) -> torch.Tensor:
    count = LAYERS * BLOCKS * 2 * 8 * 256
    cache = torch.arange(count, dtype=torch.int32).to(torch.int16).view(LAYERS, BLOCKS, *BLOCK)
    if peer is not None:
        peer.kept["cache"] = cache
    return cache


def one_block(peer: Peer | None) -> torch.Tensor:
    return make_cache(peer)[:, 5]


def some_blocks(peer: Peer | None) -> dict[str, Any]:
    cache = make_cache(peer)
    return {
        "three": [cache[:, i] for i in (9, 2, 30)],
        "again": cache[:, 2],
        "other": torch.arange(7),
        "pair": cache[:, 40:42].transpose(2, 3),
    }


def change(peer: Peer) -> None:
    peer.kept["cache"].add_(1)


def take(_: Peer, got: torch.Tensor, expected: torch.Tensor) -> int:
    assert torch.equal(got, expected)
    return got.untyped_storage().nbytes()


def test_one_block_moves_alone(producer: Any, way: tuple[str, Any]) -> None:
    """What the producer writes before the pull is sent, as for any other tensor."""
    transport, taker = way
    ref = producer.make.options(tensor_transport=transport).remote(one_block)
    ray.wait([ref])
    if transport == "files":  # which copies at once, and spans
        assert ray.get(taker.run.remote(take, ref, one_block(None))) > NBYTES
        return
    ray.get(producer.run.remote(change))
    assert ray.get(taker.run.remote(take, ref, one_block(None) + 1)) <= NBYTES + 64


def test_several_blocks(producer: Any, way: tuple[str, Any]) -> None:
    def check(_: Peer, got: Any, want: Any) -> None:
        for one, two in zip([*got["three"], got["again"], got["other"], got["pair"]], want):
            assert values.bytes_of(one) == values.bytes_of(two)
            assert one.shape == two.shape
        got["again"].fill_(-1)
        assert got["three"][1].eq(-1).all()
        assert not got["three"][0].eq(-1).all()

    transport, taker = way
    ref = producer.make.options(tensor_transport=transport).remote(some_blocks)
    made = some_blocks(None)
    want = [*made["three"], made["again"], made["other"], made["pair"]]
    ray.get(taker.run.remote(check, ref, [tensor.clone() for tensor in want]))


def test_a_small_block_rides_along(producer: Any) -> None:
    ref = producer.make.remote(lambda _: torch.arange(1 << 20).view(64, 64, 256)[:8, 3])
    assert torch.equal(ray.get(ref), torch.arange(1 << 20).view(64, 64, 256)[:8, 3])


def test_a_block_into_a_target(producer: Any, way: tuple[str, Any]) -> None:
    def get_into(_: Peer, refs: list[Any]) -> bool:
        cache = torch.zeros(LAYERS, BLOCKS, *BLOCK, dtype=torch.int16)
        dense = torch.zeros(LAYERS, *BLOCK, dtype=torch.int16)
        for target in (cache[:, 7], dense):
            ray.experimental.set_target_for_ref(refs[0], [target])
            assert ray.get(refs[0]) is target
            assert torch.equal(target, one_block(None))
        cache[:, 7] = 0
        return not cache.any()

    transport, taker = way
    ref = producer.make.options(tensor_transport=transport).remote(one_block)
    assert ray.get(taker.run.remote(get_into, [ref]))


def test_a_block_with_checksums(producer: Any, spawn: Any) -> None:
    taker = spawn(Peer, runtime_env={"env_vars": {"RAY_RDT_CHECKSUM": "1"}})
    ref = producer.make.remote(one_block)
    assert ray.get(taker.run.remote(take, ref, one_block(None))) <= NBYTES + 64
