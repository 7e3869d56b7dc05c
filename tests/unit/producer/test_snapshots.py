"""Copies of objects in a memory pool, of host and of device memory."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.errors import NixlOutOfMemoryError
from ray.experimental.rdt.producer import snapshots, transport_server
from ray.experimental.rdt.producer.tensor_store import AdmissionControl, TensorStore
from ray.experimental.rdt.serialization import layout
from ray.experimental.rdt.transports.base import Capabilities
from tests import fake_device
from tests.fake_device import accelerator

LARGE = 100_000
TYPE = fake_device.TYPE


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "may_wait", lambda: False)


def make(nbytes: int = 4 * LARGE, device: str = "cpu", nixl: Any = None) -> snapshots.Snapshots:
    made = snapshots.Snapshots(AdmissionControl(TensorStore()), lambda: nixl)
    made.make_pool(nbytes, device)
    return made


def sent(captured: layout.Captured, device_type: str, lane: str = "nixl") -> list[torch.Tensor]:
    """Return the buffers that a transport sends for an object."""
    stored: Any = SimpleNamespace(captured=captured)
    capabilities = Capabilities(lane, frozenset(), False, sends_from_host=lane == "nixl")
    transport: Any = SimpleNamespace(capabilities=capabilities)
    deadline = Deadline.after(60)
    transport_server.await_writers(stored, device_type, deadline)
    return transport_server.buffers_for(transport, stored, device_type, deadline)


def test_the_regions_are_copied_and_the_values_tensors_are_the_users() -> None:
    whole = torch.zeros(LARGE, dtype=torch.uint8)
    captured = layout.lay_out([whole, whole[10:], torch.ones(LARGE, dtype=torch.uint8)])
    assert make().take(captured)
    whole.fill_(7)
    assert [int(buffer.sum()) for buffer in sent(captured, "cpu")] in (
        [0, LARGE],
        [LARGE, 0],
    )
    assert captured.addresses.tolist() == [b.data_ptr() for b in sent(captured, "cpu")]
    assert captured.tensors[0] is whole


def test_the_room_is_free_again_when_the_object_is() -> None:
    pool = make(LARGE + 64)
    for _ in range(3):
        assert pool.take(layout.lay_out([torch.ones(LARGE, dtype=torch.uint8)]))


def test_small_objects_need_no_copy() -> None:
    captured = layout.lay_out([torch.ones(10)])
    assert make().take(captured)
    assert captured.copies is None


def test_what_the_user_has_registered_is_not_copied() -> None:
    nixl = SimpleNamespace(has_registered=lambda buffers: True)
    captured = layout.lay_out([torch.ones(LARGE)])
    assert make(8 * LARGE, nixl=nixl).take(captured)
    assert captured.copies is None


def test_device_memory_is_copied_in_the_order_of_the_stream() -> None:
    """The copy comes after what the stream has so far and before what it is given next."""
    gate = threading.Event()
    tensor = torch.zeros(LARGE, device=f"{TYPE}:0")
    fake_device.launch(tensor, 1.0, gate)
    captured = layout.lay_out([tensor])
    assert make(8 * LARGE, f"{TYPE}:0").take(captured)
    fake_device.launch(tensor, 2.0)
    gate.set()
    (buffer,) = sent(captured, TYPE)
    assert buffer.device == tensor.device
    assert set(fake_device.on_host(buffer).view(torch.float32).tolist()) == {1.0}


def test_a_pool_on_the_host_takes_device_memory() -> None:
    tensor = torch.ones(LARGE, device=f"{TYPE}:1")
    captured = layout.lay_out([tensor])
    assert make(8 * LARGE).take(captured)
    fake_device.launch(tensor, 2.0)
    (buffer,) = sent(captured, TYPE)
    assert buffer.is_cpu
    assert set(buffer.view(torch.float32).tolist()) == {1.0}
    (buffer,) = sent(captured, TYPE, lane="staged")
    assert buffer.device == tensor.device
    assert set(fake_device.on_host(buffer).view(torch.float32).tolist()) == {1.0}


def test_a_pool_on_a_device_takes_no_other_memory() -> None:
    pool = make(8 * LARGE, f"{TYPE}:0")
    for tensor in (torch.ones(LARGE), torch.ones(LARGE, device=f"{TYPE}:1")):
        captured = layout.lay_out([tensor])
        assert pool.take(captured)
        assert captured.copies is None


def test_device_memory_without_room_is_an_error() -> None:
    captured = layout.lay_out([torch.ones(LARGE, device=f"{TYPE}:0")])
    with pytest.raises(NixlOutOfMemoryError, match="cannot go through Ray's object store"):
        make(LARGE, f"{TYPE}:0").take(captured)


def test_host_memory_without_room_is_refused() -> None:
    pool = make(LARGE)
    assert not pool.take(layout.lay_out([torch.ones(LARGE)]))
    gc.collect()
    assert pool.take(layout.lay_out([torch.ones(LARGE - 64, dtype=torch.uint8)]))


def test_the_named_stream_orders_the_copy() -> None:
    """The copy runs after what the named stream has and before what it is given next."""

    class Named(fake_device.Stream):
        device = torch.device(TYPE, 0)

    stream, gate = Named(), threading.Event()
    tensor = torch.zeros(LARGE, device=f"{TYPE}:0")
    accelerators.name_stream(stream)
    try:
        with accelerator.on(stream):
            fake_device.launch(tensor, 1.0, gate)
        captured = layout.lay_out([tensor])
        assert make(8 * LARGE, f"{TYPE}:0").take(captured)
        with accelerator.on(stream):
            fake_device.launch(tensor, 2.0)
    finally:
        accelerators.name_stream(None)
    gate.set()
    (buffer,) = sent(captured, TYPE)
    assert set(fake_device.on_host(buffer).view(torch.float32).tolist()) == {1.0}


def test_whole_devices_are_waited_for_if_the_user_asks() -> None:
    waited: list[Any] = []
    nixl = SimpleNamespace(has_registered=lambda _: False, check_writers=waited.extend)
    tensor = torch.ones(LARGE, device=f"{TYPE}:0")
    assert make(8 * LARGE, nixl=nixl).take(layout.lay_out([tensor]))
    assert [buffer.device for buffer in waited] == [tensor.device]
