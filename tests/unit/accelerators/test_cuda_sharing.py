"""CUDA IPC's calls, over a stand-in for cuda-bindings that answers as the package does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray.experimental.rdt.accelerators import cuda, cuda_calls, cuda_sharing
from ray.experimental.rdt.accelerators.cuda import CudaAccelerator
from ray.experimental.rdt.accelerators.cuda_calls import CudaError, CudaEvent
from ray.experimental.rdt.accelerators.cuda_sharing import CudaSharing
from ray.experimental.rdt.accelerators.shared_memory import CannotShare

DEVICE = torch.device("cuda", 1)
START, NBYTES = 0x7F0000000000, 20 << 20
HANDLE = bytes(range(64))


class Code(int):
    """An enum's value as cuda-bindings gives it."""

    name = "cudaErrorSomething"


class MemHandle:
    """A handle with no attribute but its address, as in cuda-bindings 13.5."""

    def __init__(self, data: bytes = bytes(64)):
        self._data = ctypes.create_string_buffer(data, 64)

    def getPtr(self) -> int:  # noqa: N802
        return ctypes.addressof(self._data)


class Cuda:
    """The calls that are used of both modules, and what they answer.

    Those that end another thread's graph capture in the mode "global" are asserted to come in the
    mode "relaxed".

    Attributes:
        codes: By call, an error.
        attributes: Of all memory.
        log: The calls that change something.
        mode: This thread's capture mode.
        checked: How many calls were looked at.
    """

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.attributes: dict[str, int] = {"IS_LEGACY_CUDA_IPC_CAPABLE": True}
        self.log: list[Any] = []
        self.mode = "global"
        self.checked = 0
        relaxed = SimpleNamespace(cudaStreamCaptureModeRelaxed="relaxed")
        self.runtime = SimpleNamespace(
            cudaStreamCaptureMode=relaxed,
            cudaIpcMemLazyEnablePeerAccess=1,
            cudaIpcMemHandle_t=MemHandle,
            cudaThreadExchangeStreamCaptureMode=self._exchange,
            cudaStreamNonBlocking="non-blocking",
            cudaStreamDefault="default",
            cudaStreamCreateWithFlags=lambda flags: (
                self.log.append(("stream", flags)),
                *(self._code("stream"), 77),
            )[1:],
            cudaHostRegisterPortable="portable",
            cudaHostRegister=lambda address, nbytes, flags: (self._code("pin"),),
            cudaHostUnregister=lambda address: (self._code("unpin"),),
            cudaSetDevice=lambda index: (self.log.append(("device", index)), self._code("set"))[1:],
            cudaIpcGetMemHandle=self._get,
            cudaIpcOpenMemHandle=self._open,
            cudaIpcCloseMemHandle=lambda address: (
                self.log.append(("close", address)),
                self._code("close"),
            )[1:],
        )
        names = ("IS_LEGACY_CUDA_IPC_CAPABLE", "IS_MANAGED", "MEMPOOL_HANDLE")
        self.driver = SimpleNamespace(
            CUdeviceptr=lambda address: ("pointer", address),
            CUpointer_attribute=SimpleNamespace(
                **{f"CU_POINTER_ATTRIBUTE_{name}": name for name in names}
            ),
            cuPointerGetAttribute=self._attribute,
            cuMemGetAddressRange=lambda pointer: (self._code("range"), START, NBYTES),
        )

    def _exchange(self, mode: str) -> tuple[Code, str]:
        before, self.mode = self.mode, mode
        return Code(0), before

    def check_mode(self) -> None:
        assert self.mode == "relaxed"
        self.checked += 1

    def _code(self, call: str) -> Code:
        self.check_mode()
        return Code(self.codes.get(call, 0))

    def _attribute(self, name: str, pointer: Any) -> tuple[Code, Any]:
        assert pointer[0] == "pointer"
        return (Code(0), self.attributes[name]) if name in self.attributes else (Code(1), None)

    def _get(self, address: int) -> tuple[Code, Any]:
        assert address == START
        code = self._code("get")
        return code, None if code else MemHandle(HANDLE)

    def _open(self, handle: MemHandle, flags: int) -> tuple[Code, Any]:
        self.log.append(("open", ctypes.string_at(handle.getPtr(), 64), flags))
        code = self._code("open")
        return code, None if code else START


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    made = Cuda()
    for module in (cuda, cuda_calls, cuda_sharing):
        monkeypatch.setattr(module, "bindings", lambda: made.runtime)
        monkeypatch.setattr(module, "driver", lambda: made.driver)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    yield made
    assert made.mode == "global"


@pytest.fixture
def sharing(calls: Cuda) -> CudaSharing:
    return CudaSharing(lambda device: pytest.fail("no stream is needed"))


def test_segment_of_an_address(calls: Cuda, sharing: CudaSharing):
    assert sharing.export(START + 512, DEVICE) == (HANDLE, START, NBYTES)
    assert calls.log == [("device", 1)]


def test_memory_is_opened_on_the_consumers_device_and_closed(calls: Cuda, sharing: CudaSharing):
    assert sharing.map(HANDLE, DEVICE) == START
    sharing.unmap(START, DEVICE)
    opened = ("open", HANDLE, 1)
    assert calls.log == [("device", 1), opened, ("device", 1), ("close", START)]


@pytest.mark.parametrize(
    ("attributes", "is_expandable", "reason"),
    [
        ({"MEMPOOL_HANDLE": 77}, False, "a pool of cudaMallocAsync"),
        ({"IS_MANAGED": True}, False, "managed memory"),
        ({}, True, r"an expandable segment.*expandable_segments:True"),
        ({}, False, "not allocated by cudaMalloc"),
    ],
)
def test_memory_without_a_handle_is_named(
    calls: Cuda, sharing: CudaSharing, monkeypatch, attributes, is_expandable, reason
):
    calls.attributes = {"IS_LEGACY_CUDA_IPC_CAPABLE": False, "MEMPOOL_HANDLE": 0, **attributes}
    snapshot = [{"is_expandable": is_expandable, "address": START, "total_size": NBYTES}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    with pytest.raises(CannotShare, match=reason):
        sharing.export(START + 512, DEVICE)


def test_driver_that_does_not_know_the_attribute_is_asked_for_the_handle(
    calls: Cuda, sharing: CudaSharing
):
    calls.attributes = {}
    assert sharing.export(START, DEVICE)[0] == HANDLE


@pytest.mark.parametrize("call", ["range", "get"])
def test_refused_handle(calls: Cuda, sharing: CudaSharing, call: str):
    calls.codes[call] = 801
    with pytest.raises(CannotShare, match="failed: cudaErrorSomething"):
        sharing.export(START, DEVICE)


@pytest.mark.parametrize("code", [214, 700, 710])
def test_failed_device_is_not_a_refusal(calls: Cuda, sharing: CudaSharing, code: int):
    calls.codes = {"get": code, "open": code}
    with pytest.raises(CudaError):
        sharing.export(START, DEVICE)
    with pytest.raises(CudaError):
        sharing.map(HANDLE, DEVICE)


def test_refused_mapping(calls: Cuda, sharing: CudaSharing):
    calls.codes["open"] = 400
    with pytest.raises(CannotShare, match="cudaIpcOpenMemHandle failed"):
        sharing.map(HANDLE, DEVICE)


def test_without_cuda_bindings(monkeypatch, sharing: CudaSharing):
    monkeypatch.setattr(cuda_sharing, "driver", lambda: None)
    with pytest.raises(CannotShare, match=r"cuda-bindings.*is not installed"):
        sharing.export(START, DEVICE)
    with pytest.raises(CannotShare, match=r"cuda-bindings.*is not installed"):
        sharing.map(HANDLE, DEVICE)


def test_devices_that_do_not_reach_each_other(monkeypatch, sharing: CudaSharing):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=f"GPU-{d.index}")
    )
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda device, other: False)
    assert "cannot reach the memory of cuda:0" in sharing.unreachable_reason(DEVICE, "GPU-0")
    assert sharing.unreachable_reason(DEVICE, "GPU-1") == ""
    assert sharing.unreachable_reason(DEVICE, "one that this process does not see") == ""


# While a thread of the user's captures a graph in the mode "global".


@pytest.fixture
def accelerator(calls: Cuda, monkeypatch: pytest.MonkeyPatch) -> CudaAccelerator:
    class Event:
        def __init__(self, interprocess: bool = False):
            """Create no CUDA event."""

        def record(self, stream: Any) -> None:
            calls.check_mode()

        def query(self) -> bool:
            calls.check_mode()
            return True

        def ipc_handle(self) -> bytes:
            calls.check_mode()
            return b"event"

        @staticmethod
        def from_ipc_handle(device: torch.device, handle: bytes) -> None:
            calls.check_mode()

    def external(raw: int, device: torch.device) -> Any:
        return SimpleNamespace(raw=raw, device=device, wait_event=lambda event: None)

    def empty(*shape: int, **options: Any) -> None:
        calls.check_mode()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "ExternalStream", external)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch, "empty", empty)
    return CudaAccelerator()


def event_of(calls: Cuda) -> CudaEvent:
    reached = SimpleNamespace(query=lambda: calls.check_mode() is None)
    return CudaEvent(reached, DEVICE)


class Copied:
    """A target on a GPU."""

    is_cuda = True

    def __init__(self, calls: Cuda):
        self._calls = calls

    def numel(self) -> int:
        return 1 << 20

    def copy_(self, source: Any, non_blocking: bool) -> None:
        self._calls.check_mode()


HOST = SimpleNamespace(data_ptr=lambda: 4096, nbytes=8192)
AWAY = SimpleNamespace(is_cuda=True, get_device=lambda: 1, data_ptr=lambda: START)


def enter(block: Any, calls: Cuda) -> None:
    with block:
        calls.check_mode()


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda a, calls: a.empty(3, DEVICE), id="empty"),
        pytest.param(lambda a, calls: a.pinned(3), id="pinned"),
        pytest.param(lambda a, calls: a.record(DEVICE), id="record"),
        pytest.param(lambda a, calls: a.copy([(Copied(calls), AWAY)], DEVICE), id="copy"),
        pytest.param(lambda a, calls: a.pin(HOST)(), id="pin"),
        pytest.param(lambda a, calls: a.segment(AWAY), id="segment"),
        pytest.param(lambda a, calls: a.new_stream(DEVICE), id="new_stream"),
        pytest.param(lambda a, calls: enter(a.capture_safe(), calls), id="capture_safe"),
        pytest.param(lambda a, calls: enter(a.on(SimpleNamespace(device=1)), calls), id="on"),
        pytest.param(lambda a, calls: event_of(calls).is_reached(), id="is_reached"),
        pytest.param(lambda a, calls: event_of(calls).wait(1), id="wait"),
        pytest.param(lambda a, calls: a.sharing.driver.export(START, DEVICE), id="export"),
        pytest.param(lambda a, calls: a.sharing.driver.map(HANDLE, DEVICE), id="map"),
        pytest.param(lambda a, calls: a.sharing.driver.unmap(START, DEVICE), id="unmap"),
        pytest.param(
            lambda a, calls: a.sharing.driver.export_event(event_of(calls)), id="export_event"
        ),
        pytest.param(
            lambda a, calls: a.sharing.driver.import_event(b"event", DEVICE), id="import_event"
        ),
    ],
)
def test_calls_disturb_no_capture_of_another_thread(
    calls: Cuda, accelerator: CudaAccelerator, use: Callable[[CudaAccelerator, Cuda], Any]
):
    use(accelerator, calls)
    assert calls.checked
    assert calls.mode == "global"


def test_private_streams_do_not_wait_for_the_default_stream(
    calls: Cuda, accelerator: CudaAccelerator
):
    stream: Any = accelerator.new_stream(DEVICE)
    assert calls.log == [("device", 1), ("stream", "non-blocking")]
    assert (stream.raw, stream.device) == (77, DEVICE)
