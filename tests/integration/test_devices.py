"""Tensors on a device, between real processes, with a device that is a fake; see tests/fake_device.

Nothing of this has run on a GPU: tests/gpu does, where there is one.
"""

from __future__ import annotations

import gc
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
from ray.experimental.rdt.transports import conformance
from ray.experimental.rdt.transports.conformance import CASES, Case, Stage
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
        setattr(accelerator.sharing.driver if owner == "sharing" else accelerator, leaf, value)


@pytest.fixture
def change(near: Any, far: Any) -> Iterator[Callable[..., None]]:
    """Changes an actor's fake device for one test."""

    def undo() -> None:
        before = {"current": 0, "sharing__broken": "", "sharing__unreachable": set()}
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
        "copies": accelerator.copies,
    }


def exported(_: Peer) -> int:
    return int(fake().accelerator.sharing.driver.exported)


def mapped(_: Peer) -> int:
    gc.collect()  # the fake device's operators make cycles
    return int(fake().accelerator.sharing.driver.live)


def all_is_unmapped(actor: Any) -> None:
    wait_until(lambda: ray.get(actor.run.remote(mapped)) == 0, "all is unmapped")


@pytest.mark.parametrize("count", [20, LARGE])
def test_host_and_device_tensors_go_each_their_way(near: Any, far: Any, count: int) -> None:
    before = ray.get(near.run.remote(exported))
    seen = ray.get(far.run.remote(facts, near.make.remote(mixed, count)))
    assert seen["devices"] == [f"{TYPE}:0", f"{TYPE}:0", "cpu"]
    assert seen["right"]
    assert seen["host"]
    assert seen["tied"]
    assert ray.get(near.run.remote(exported)) == before + 1
    all_is_unmapped(far)


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


def test_devices_that_do_not_reach_each_other(near: Any, far: Any, change: Any) -> None:
    change(far, sharing__unreachable={"fake-1"})
    seen = ray.get(far.run.remote(facts, near.make.remote(mixed)))
    assert seen["devices"][0] == f"{TYPE}:0"
    assert seen["right"]
    assert seen["tied"]
    all_is_unmapped(far)


def test_target_device_cpu_goes_through_pinned_memory(near: Any) -> None:
    ref, before = near.make.remote(mixed), ray.get(near.run.remote(exported))
    set_target_device_for_ref(ref, "cpu")
    assert ray.get(ref)["base"].equal(torch.arange(1000.0))
    assert ray.get(near.run.remote(exported)) == before


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
def test_target_device(near: Any, device: str) -> None:
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


# The producer's own memory, for the transport that is named.


IPC = f"{TYPE}_ipc"


def keep_numbers(peer: Peer, nbytes: int = 100) -> list[Any]:
    """Tensors that the producer goes on using, some of them views of each other."""
    base = torch.arange(nbytes, dtype=torch.float32, device=TYPE)
    peer.kept["numbers"] = base
    return [base, {"tail": base[-10:]}, torch.ones(3, device=TYPE)]


def make_shared(producer: Any, action: Any, *args: Any) -> Any:
    return producer.make.options(tensor_transport=IPC).remote(action, *args)


def write(peer: Peer, value: float) -> None:
    peer.kept["numbers"].fill_(value)


def hold(peer: Peer, value: list[Any]) -> list[Any]:
    peer.kept["held"] = value
    return [value[0].cpu().tolist(), value[1]["tail"].cpu().tolist(), value[2].cpu().tolist()]


def look_at_held(peer: Peer) -> list[Any]:
    base, nested, _ = peer.kept["held"]
    assert nested["tail"].data_ptr() == base[-10:].data_ptr()
    return [base.cpu().tolist()[0], nested["tail"].cpu().tolist()[0]]


def let_go(peer: Peer) -> None:
    peer.kept.pop("held")


def loans(peer: Peer) -> int:
    gc.collect()
    return len(ray._private.worker.global_worker.rdt_manager.transport(IPC)._loans)


def test_named_transport_gives_the_producers_own_memory(near: Any, far: Any) -> None:
    ref = make_shared(near, keep_numbers)
    copies = ray.get(far.run.remote(lambda _: fake().accelerator.copies))
    got = ray.get(far.run.remote(hold, ref))
    assert got == [list(range(100)), list(range(90, 100)), [1.0] * 3]
    assert ray.get(far.run.remote(lambda _: fake().accelerator.copies)) == copies
    ray.get(near.run.remote(write, 7))
    assert ray.get(far.run.remote(look_at_held)) == [7.0, 7.0]
    ray.get(far.run.remote(lambda peer: peer.kept["held"][0].fill_(8) is None))
    assert ray.get(near.run.remote(lambda peer: peer.kept["numbers"].cpu().tolist()[5])) == 8.0
    ray.get(far.run.remote(let_go))
    all_is_unmapped(far)


def test_shared_memory_outlives_the_reference(near: Any, far: Any) -> None:
    # With a segment of its own, which ends with it.
    ref = make_shared(near, lambda _: [torch.arange(float(1 << 17), device=TYPE), 1, "text"])
    ray.get(far.run.remote(lambda peer, value: peer.kept.update(held=value), ref))
    del ref

    wait_until(lambda: ray.get(near.stats.remote())["stored_objects"] == 0, "it is dropped")
    read = far.run.remote(lambda peer: peer.kept["held"][0].cpu().tolist())
    assert ray.get(read) == list(range(1 << 17))
    ray.get(far.run.remote(let_go))
    all_is_unmapped(far)


def test_auto_and_targets_copy(near: Any, far: Any) -> None:
    def receive(_: Peer, refs: list[Any]) -> list[float]:
        target = torch.zeros(9, device=TYPE)
        set_target_for_ref(refs[0], [target])
        (got,) = ray.get(refs[0])
        assert got is target
        return list(target.cpu().tolist())

    ref = make_shared(near, lambda _: [torch.arange(9.0, device=TYPE)])
    assert ray.get(far.run.remote(receive, [ref])) == list(range(9))
    ray.get(far.run.remote(hold, near.make.remote(keep_numbers)))
    ray.get(near.run.remote(write, 7))
    assert ray.get(far.run.remote(look_at_held)) == [0.0, 90.0]
    ray.get(far.run.remote(let_go))


def test_shared_memory_is_passed_on(near: Any, far: Any, spawn: Any) -> None:
    third = spawn(Peer)
    ray.get(third.run.remote(has_device))
    first = make_shared(near, keep_numbers)
    ray.get(far.run.remote(hold, first))
    second = make_shared(far, lambda peer: peer.kept["held"])
    assert ray.get(third.run.remote(hold, second))[0] == list(range(100))
    ray.get(near.run.remote(write, 6))
    assert ray.get(third.run.remote(look_at_held)) == [6.0, 6.0]
    back = near.run.remote(
        lambda peer, value: value[0].data_ptr() == peer.kept["numbers"].data_ptr(), second
    )
    assert ray.get(back)
    del first, second, back
    ray.get([actor.run.remote(let_go) for actor in (far, third)])
    all_is_unmapped(far)
    all_is_unmapped(third)


def test_shared_memory_is_written_by_the_producers_stream_first(near: Any, far: Any) -> None:
    def written_late(_: Peer) -> torch.Tensor:
        device, gate = fake(), threading.Event()
        tensor = torch.zeros(100, device=TYPE)
        device.launch(tensor, 5, gate)
        threading.Timer(1.5, gate.set).start()
        return tensor

    def look(_: Peer, tensor: torch.Tensor) -> tuple[float, float]:
        device = fake()
        early = float(tensor.cpu().sum())
        seen = torch.zeros(100)
        device.accelerator.stream().give(lambda: seen.copy_(device.on_host(tensor)))
        device.accelerator.record(tensor.device).wait(30)
        return early, float(seen.sum())

    ref = make_shared(near, written_late)
    assert ray.get(far.run.remote(look, ref)) == (0.0, 500.0)


def test_ten_thousand_shared_tensors(near: Any, far: Any) -> None:
    def many(_: Peer) -> list[torch.Tensor]:
        return [torch.full((4,), float(i), device=TYPE) for i in range(10_000)]

    def total(_: Peer, tensors: list[torch.Tensor]) -> float:
        on_host = fake().on_host
        return sum(float(on_host(tensor)[0]) for tensor in tensors)

    assert ray.get(far.run.remote(total, make_shared(near, many))) == sum(range(10_000))
    all_is_unmapped(far)


def test_death_of_a_consumer_gives_shared_memory_back(near: Any, spawn: Any) -> None:
    dying = spawn(Peer)
    ray.get(dying.run.remote(has_device))
    ref = make_shared(near, keep_numbers)
    ray.get(dying.run.remote(hold, ref))
    assert ray.get(near.run.remote(loans)) == 1
    dying.run.remote(lambda _: os._exit(1))
    wait_until(lambda: ray.get(near.run.remote(loans)) == 0, "the loan ends")


def test_death_of_a_producer_is_told_where_its_memory_is_used_next(far: Any, spawn: Any) -> None:
    dying = spawn(Peer)
    ray.get(dying.run.remote(has_device))
    ref = make_shared(dying, keep_numbers)
    ray.get(far.run.remote(hold, ref))
    pid = ray.get(dying.run.remote(lambda _: os.getpid()))
    dying.run.remote(lambda _: os._exit(1))
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "it has ended")
    for name in (IPC, "auto"):
        passed_on = far.make.options(tensor_transport=name).remote(lambda peer: peer.kept["held"])
        with pytest.raises(RayError, match=f"process {pid} has ended"):
            ray.get(passed_on, timeout=60)
    ray.get(far.run.remote(let_go))


# What every transport must do.


@ray.remote(num_cpus=0)
class Member(conformance.Member):
    """Has a device, where it makes its tensors."""

    def __init__(self) -> None:
        fake()
        super().__init__(TYPE)


@pytest.fixture(scope="module")
def members(local_ray: None) -> Iterator[list[Any]]:
    made = [Member.remote() for _ in range(3)]
    yield made
    for member in made:
        ray.kill(member)


@pytest.mark.parametrize("case", CASES, ids=[case.__name__ for case in CASES])
def test_conformance_of_shared_memory(members: list[Any], spawn: Any, case: Case) -> None:
    case(Stage(IPC, *members, lambda: spawn(Member)))
