"""A process whose threads and locks gevent has patched sends and receives like others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ray
from tests.integration.peers import LARGE, Peer, count_up, ones, total, total_of_refs

pytest.importorskip("gevent", reason="gevent is not installed")


@ray.remote(num_cpus=0)
class Patched(Peer.__ray_metadata__.modified_class):  # type: ignore[misc]
    """As programs do it: before anything else of theirs."""

    def __init__(self) -> None:
        from gevent import monkey

        monkey.patch_all()
        super().__init__()


@pytest.fixture(scope="module")
def patched(local_ray: None) -> Any:
    actor = Patched.remote()
    yield actor
    ray.kill(actor)


def test_it_receives(patched: Any, producer: Any, transport: str) -> None:
    ref = producer.make.options(tensor_transport=transport).remote(ones)
    assert ray.get(patched.run.remote(total, ref), timeout=20) == LARGE
    assert ray.get(patched.run.remote(total_of_refs, [ref]), timeout=20) == LARGE


def test_it_sends(patched: Any, consumer: Any, transport: str) -> None:
    ref = patched.make.options(tensor_transport=transport).remote(ones)
    assert ray.get(consumer.run.remote(total, ref), timeout=20) == LARGE


def test_it_frees(patched: Any, consumer: Any) -> None:
    def free(peer: Any) -> float:
        tensor = torch.ones(LARGE)
        ref = ray.put(tensor, _tensor_transport="auto")
        total = float(ray.get(ref).sum())
        del ref
        ray.experimental.wait_tensor_freed(tensor, timeout=10)
        return total

    assert ray.get(patched.run.remote(free), timeout=20) == LARGE


@pytest.mark.usefixtures("users_transports")
@pytest.mark.parametrize("name", ["shm", "pipe", "alpha"])
def test_transports_of_users(patched: Any, producer: Any, consumer: Any, name: str) -> None:
    ref = producer.make.options(tensor_transport=name).remote(count_up, 10)
    assert ray.get(patched.run.remote(total, ref), timeout=20) == 45
    ref = patched.make.options(tensor_transport=name).remote(count_up, 10)
    assert ray.get(consumer.run.remote(total, ref), timeout=20) == 45


def test_greenlets_take_turns(patched: Any, producer: Any) -> None:
    def in_greenlets(peer: Any, refs: list[Any]) -> float:
        import gevent

        greenlets = [gevent.spawn(total_of_refs, peer, [ref]) for ref in refs]
        gevent.joinall(greenlets, timeout=15)
        return sum(greenlet.value for greenlet in greenlets)

    refs = [producer.make.remote(ones) for _ in range(5)]
    assert ray.get(patched.run.remote(in_greenlets, refs), timeout=20) == 5 * LARGE
