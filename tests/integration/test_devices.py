"""Tensors on a device, between real processes, with a device that is a fake; see tests/fake_device.

Nothing of this has run on a GPU: tests/gpu does, where there is one.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, RayError

import ray
from ray.experimental import set_target_device_for_ref, set_target_for_ref
from tests.integration.peers import Peer
from tests.support import needs_nixl, wait_until

TYPE = "fakegpu"
#: Over three chunks of the staged way.
LARGE = 11 << 20


def fake(_: Any = None) -> Any:
    """This process's fake device; it has one from now on."""
    return importlib.import_module("tests.fake_device")


def has_device(_: Peer) -> bool:
    return bool(fake())


@pytest.fixture(scope="module", autouse=True)
def driver_has_device(local_ray: None) -> None:
    fake()


@pytest.fixture(scope="module")
def near(producer: Any) -> Any:
    """The producer, with a device."""
    assert ray.get(producer.run.remote(has_device))
    return producer


@pytest.fixture(scope="module")
def far(consumer: Any) -> Any:
    """The consumer, with a device."""
    assert ray.get(consumer.run.remote(has_device))
    return consumer


def _set(_: Peer, **attributes: Any) -> None:
    for name, value in attributes.items():
        owner, _, leaf = name.rpartition("__")
        accelerator = fake().accelerator
        setattr(accelerator.sharing if owner == "sharing" else accelerator, leaf, value)


@pytest.fixture
def change(near: Any, far: Any) -> Iterator[Callable[..., None]]:
    """Changes an actor's fake device for one test."""

    def undo() -> None:
        before = {"current": 0, "sharing__broken": "", "sharing__visible": {0, 1}}
        ray.get([actor.run.remote(_set, **before) for actor in (near, far)])

    yield lambda actor, **attributes: ray.get(actor.run.remote(_set, **attributes))
    undo()


def mixed(_: Peer, count: int = 1000) -> dict[str, Any]:
    base = torch.arange(count, dtype=torch.float32).to(f"{TYPE}:1")
    return {"base": base, "tail": base[-10:], "host": torch.arange(count), "text": "x"}


def facts(_: Peer, value: dict[str, Any]) -> dict[str, Any]:
    accelerator = fake().accelerator
    base, tail = value["base"], value["tail"]
    return {
        "devices": [str(base.device), str(tail.device), str(value["host"].device)],
        "right": base.cpu().equal(torch.arange(len(base), dtype=torch.float32)),
        "host": value["host"].equal(torch.arange(len(base))),
        "tied": base.data_ptr() + 4 * (len(base) - 10) == tail.data_ptr(),
        "live": accelerator.sharing.live,
        "copies": accelerator.copies,
    }


def shared(_: Peer) -> tuple[int, int]:
    sharing = fake().accelerator.sharing
    return sharing.shared, sharing.revoked


@pytest.mark.parametrize("count", [20, LARGE])
def test_host_and_device_tensors_go_each_their_way(near: Any, far: Any, count: int) -> None:
    before = ray.get(near.run.remote(shared))
    seen = ray.get(far.run.remote(facts, near.make.remote(mixed, count)))
    assert seen["devices"] == [f"{TYPE}:0", f"{TYPE}:0", "cpu"]
    assert seen["right"]
    assert seen["host"]
    assert seen["tied"]
    assert seen["live"] == 0
    assert ray.get(near.run.remote(shared)) == (before[0] + 1, before[1])


@pytest.mark.parametrize("count", [20, LARGE])
def test_memory_that_cannot_be_shared_goes_through_the_host(
    near: Any, far: Any, change: Any, count: int
) -> None:
    change(near, sharing__broken="an expandable segment")
    before = ray.get(near.stats.remote())
    copies = ray.get(far.run.remote(lambda _: fake().accelerator.copies))
    seen = ray.get(far.run.remote(facts, near.make.remote(mixed, count)))
    assert seen["devices"] == [f"{TYPE}:0", f"{TYPE}:0", "cpu"]
    assert seen["right"]
    assert seen["host"]
    assert seen["tied"]
    assert seen["copies"] - copies == (1 if count == 20 else 3)
    wait_until(lambda: ray.get(near.stats.remote())["regions"] == before["regions"], "all is freed")


def test_device_that_the_consumer_does_not_see(near: Any, far: Any, change: Any) -> None:
    change(far, sharing__visible={0}, current=1)
    before = ray.get(near.run.remote(shared))
    seen = ray.get(far.run.remote(facts, near.make.remote(mixed)))
    assert seen["devices"][0] == f"{TYPE}:1"
    assert seen["right"]
    assert ray.get(near.run.remote(shared)) == before


def test_consumer_without_the_device_gets_host_tensors(near: Any, spawn: Any) -> None:
    without = spawn(Peer)

    def look(_: Peer, value: Any) -> tuple[str, bool]:
        return str(value["base"].device), value["base"].equal(torch.arange(float(LARGE)))

    assert ray.get(without.run.remote(look, near.make.remote(mixed, LARGE))) == ("cpu", True)


def late(_: Peer, broken: str) -> torch.Tensor:
    """The device writes it a while after the method has returned."""
    device, gate = fake(), threading.Event()
    device.accelerator.sharing.broken = broken
    tensor = torch.zeros(LARGE, device=TYPE)
    device.launch(tensor, 5, gate)
    threading.Timer(0.5, gate.set).start()
    return tensor


@pytest.mark.parametrize("broken", ["", "an expandable segment"])
def test_bytes_are_read_when_the_producers_stream_has_written_them(
    near: Any, far: Any, change: Any, broken: str
) -> None:
    ref = near.make.remote(late, broken)
    total = ray.get(far.run.remote(lambda _, tensor: float(tensor.cpu().sum()), ref))
    assert total == 5 * LARGE


def test_same_actor_gets_the_very_tensor(near: Any) -> None:
    def keep(peer: Peer) -> torch.Tensor:
        peer.kept["device tensor"] = torch.ones(LARGE, device=TYPE)
        return peer.kept["device tensor"]

    def is_it(peer: Peer, tensor: torch.Tensor) -> tuple[bool, int]:
        return tensor is peer.kept.pop("device tensor"), fake().accelerator.copies

    copies = ray.get(near.run.remote(lambda _: fake().accelerator.copies))
    assert ray.get(near.run.remote(is_it, near.make.remote(keep))) == (True, copies)


@pytest.mark.parametrize("device", ["cpu", f"{TYPE}:0", f"{TYPE}:1"])
def test_wished_device(near: Any, device: str) -> None:
    ref = near.make.remote(mixed)
    set_target_device_for_ref(ref, device)
    got = ray.get(ref)
    assert {str(got[name].device) for name in ("base", "tail", "host")} == {device}
    assert got["base"].cpu().equal(torch.arange(1000.0))


@pytest.mark.parametrize("device", ["cpu", f"{TYPE}:0", f"{TYPE}:1"])
def test_targets_on_devices(near: Any, device: str) -> None:
    ref = near.make.remote(lambda _: [torch.arange(9.0, device=TYPE), torch.arange(5.0)])
    targets = [torch.zeros(9, device=device), torch.zeros(10, device=device)[::2]]
    set_target_for_ref(ref, targets)
    assert [one is two for one, two in zip(ray.get(ref), targets, strict=True)] == [True, True]
    assert [target.tolist() for target in targets] == [list(range(9)), list(range(5))]


def test_put_by_the_driver(far: Any) -> None:
    ref = ray.put(mixed(None, 50), _tensor_transport="auto")  # type: ignore[arg-type]
    assert ray.get(far.run.remote(facts, ref))["right"]


def test_named_transport_that_does_not_carry_the_device(near: Any, far: Any, spawn: Any) -> None:
    ref = near.make.options(tensor_transport="gloo").remote(mixed)
    with pytest.raises(RayError, match=f"gloo does not carry tensors on {TYPE}"):
        ray.get(far.run.remote(facts, ref))
    lenient = spawn(Peer, runtime_env={"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "0"}})
    assert ray.get(lenient.run.remote(facts, ref))["right"]


@needs_nixl()
def test_nixl_carries_the_host_part(near: Any, spawn: Any) -> None:
    ref = near.make.options(tensor_transport="nixl").remote(mixed)
    lenient = spawn(Peer, runtime_env={"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "0"}})
    seen = ray.get(lenient.run.remote(facts, ref))
    assert (seen["right"], seen["host"]) == (True, True)


def test_death_of_the_producer_is_known(far: Any, spawn: Any) -> None:
    def never(peer: Peer) -> torch.Tensor:
        tensor = torch.zeros(100, device=f"{has_device(peer) and TYPE}")
        fake().launch(tensor, 1, threading.Event())
        return tensor

    dying = spawn(Peer)
    ref = dying.make.remote(never)
    ray.wait([ref], fetch_local=False)
    waiting = far.run.remote(lambda _, tensor: 1, ref)
    time.sleep(0.5)
    dying.run.remote(lambda _: os._exit(1))
    with pytest.raises(ActorDiedError, match="is gone"):
        ray.get(waiting, timeout=30)
