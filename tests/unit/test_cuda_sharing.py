"""CUDA IPC's calls, over a stand-in for cuda-bindings that answers as the package does."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray.experimental.rdt.accelerators import cuda_calls, cuda_sharing
from ray.experimental.rdt.accelerators.base import CannotShare
from ray.experimental.rdt.accelerators.cuda_calls import CudaError
from ray.experimental.rdt.accelerators.cuda_sharing import CudaSharing

DEVICE = torch.device("cuda", 1)
START, NBYTES = 0x7F0000000000, 20 << 20
HANDLE = bytes(range(64))


class Code(int):
    """An enum's value as cuda-bindings gives it."""

    name = "cudaErrorSomething"


class MemHandle:
    """Has no attribute but its address, as in cuda-bindings 13.5."""

    def __init__(self, data: bytes = bytes(64)):
        self._data = ctypes.create_string_buffer(data, 64)

    def getPtr(self) -> int:  # noqa: N802
        return ctypes.addressof(self._data)


class Cuda:
    """The calls that are used of both modules, and what they answer.

    Attributes:
        codes: By call, an error.
        attributes: Of all memory.
        log: The calls that change something.
    """

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}
        self.attributes: dict[str, int] = {"IS_LEGACY_CUDA_IPC_CAPABLE": True}
        self.log: list[Any] = []
        relaxed = SimpleNamespace(cudaStreamCaptureModeRelaxed="relaxed")
        self.runtime = SimpleNamespace(
            cudaStreamCaptureMode=relaxed,
            cudaIpcMemLazyEnablePeerAccess=1,
            cudaIpcMemHandle_t=MemHandle,
            cudaThreadExchangeStreamCaptureMode=lambda mode: (Code(0), "global"),
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

    def _code(self, call: str) -> Code:
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
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    for module in (cuda_calls, cuda_sharing):
        monkeypatch.setattr(module, "bindings", lambda: made.runtime)
        monkeypatch.setattr(module, "driver", lambda: made.driver)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "memory_snapshot", list)
    return made


@pytest.fixture
def sharing(cuda: Cuda) -> CudaSharing:
    return CudaSharing(lambda device: pytest.fail("no stream is needed"))


def test_segment_of_an_address(cuda: Cuda, sharing: CudaSharing):
    assert sharing.export(START + 512, DEVICE) == (HANDLE, START, NBYTES)
    assert cuda.log == [("device", 1)]


def test_memory_is_opened_on_the_consumers_device_and_closed(cuda: Cuda, sharing: CudaSharing):
    assert sharing.map(HANDLE, DEVICE) == START
    sharing.unmap(START, DEVICE)
    opened = ("open", HANDLE, 1)
    assert cuda.log == [("device", 1), opened, ("device", 1), ("close", START)]


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
    cuda: Cuda, sharing: CudaSharing, monkeypatch, attributes, is_expandable, reason
):
    cuda.attributes = {"IS_LEGACY_CUDA_IPC_CAPABLE": False, "MEMPOOL_HANDLE": 0, **attributes}
    snapshot = [{"is_expandable": is_expandable, "address": START, "total_size": NBYTES}]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    with pytest.raises(CannotShare, match=reason):
        sharing.export(START + 512, DEVICE)


def test_driver_that_does_not_know_the_attribute_is_asked_for_the_handle(
    cuda: Cuda, sharing: CudaSharing
):
    cuda.attributes = {}
    assert sharing.export(START, DEVICE)[0] == HANDLE


@pytest.mark.parametrize("call", ["range", "get"])
def test_refused_handle(cuda: Cuda, sharing: CudaSharing, call: str):
    cuda.codes[call] = 801
    with pytest.raises(CannotShare, match="failed: cudaErrorSomething"):
        sharing.export(START, DEVICE)


@pytest.mark.parametrize("code", [214, 700, 710])
def test_failed_device_is_not_a_refusal(cuda: Cuda, sharing: CudaSharing, code: int):
    cuda.codes = {"get": code, "open": code}
    with pytest.raises(CudaError):
        sharing.export(START, DEVICE)
    with pytest.raises(CudaError):
        sharing.map(HANDLE, DEVICE)


def test_refused_mapping(cuda: Cuda, sharing: CudaSharing):
    cuda.codes["open"] = 400
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
    assert "cannot reach the memory of cuda:0" in sharing.obstacle(DEVICE, "GPU-0")
    assert sharing.obstacle(DEVICE, "GPU-1") == ""
    assert sharing.obstacle(DEVICE, "one that this process does not see") == ""
