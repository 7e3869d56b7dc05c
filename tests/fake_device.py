"""A device type that torch and RDT take for real: "fakegpu", two devices of it.

Its tensors are ordinary ``torch.Tensor``s of torch's privateuse1 key, so RDT treats them exactly as
those of a GPU. Their memory is host memory, which nobody but this module looks into; each tensor is
a memfd, so that other processes can open it as they open GPU memory.

Its streams are threads that run what they are given, in order and on their own time. ``launch``
gives the current stream a job; a tensor that a job still has to write holds old bytes before, so
whoever does not wait for the event that was recorded reads wrong ones.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils.dlpack import from_dlpack

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.side_streams import SideStreams
from ray.experimental.rdt.transports import registry as transports

TYPE = "fakegpu"
_LATE_S = 2e-3
_DLPACK_EXTENSION_DEVICE = 12

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_memory: dict[int, tuple[mmap.mmap, int]] = {}  # address -> mapping, descriptor (-1: not ours)


# Memory and tensors.


class _DLDevice(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _DLManaged(ctypes.Structure):
    pass


_Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(_DLManaged))
_DLManaged._fields_ = (
    ("tensor", _DLTensor),
    ("context", ctypes.c_void_p),
    ("deleter", _Deleter),
)
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_managed: dict[int, Any] = {}


@_Deleter
def _on_death(managed: Any) -> None:
    """Runs on: any thread, when the last tensor over the memory dies."""
    address = ctypes.addressof(managed.contents)
    _unmap(managed.contents.tensor.data)
    _managed.pop(address, None)


def _unmap(address: int | None) -> None:
    if address:
        mapping, descriptor = _memory.pop(address)
        with contextlib.suppress(BufferError):
            mapping.close()
        if descriptor >= 0:
            os.close(descriptor)


def _map(nbytes: int, descriptor: int, owner: int) -> int:
    mapping = mmap.mmap(descriptor, nbytes)
    address = ctypes.addressof(ctypes.c_uint8.from_buffer(mapping))
    _memory[address] = mapping, owner
    return address


def _tensor_at(address: int, nbytes: int, index: int) -> torch.Tensor:
    """A flat uint8 fakegpu tensor that owns the mapping at an address."""
    managed = _DLManaged()
    shape, strides = (ctypes.c_int64 * 1)(nbytes), (ctypes.c_int64 * 1)(1)
    managed.tensor.data = address
    managed.tensor.device = _DLDevice(_DLPACK_EXTENSION_DEVICE, index)
    managed.tensor.ndim, managed.tensor.code, managed.tensor.bits, managed.tensor.lanes = 1, 1, 8, 1
    managed.tensor.shape, managed.tensor.strides = shape, strides
    managed.deleter = _on_death
    _managed[ctypes.addressof(managed)] = managed, shape, strides
    return from_dlpack(_new_capsule(ctypes.addressof(managed), b"dltensor", None))


def _allocate(nbytes: int, index: int) -> torch.Tensor:
    if not nbytes:
        return _tensor_at(0, 0, index)
    descriptor = os.memfd_create("fakegpu")
    os.ftruncate(descriptor, nbytes)
    return _tensor_at(_map(nbytes, descriptor, descriptor), nbytes, index)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the same memory."""
    if tensor.is_cpu:
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    view = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    base = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
    shape = tensor.storage_offset(), tensor.size(), tensor.stride()
    return torch.empty(0, dtype=tensor.dtype).set_(base, *shape)


# Operators: metadata ones run torch's CPU kernels as they are, all others on the memory.


def _index_of(device: Any) -> int:
    index = torch.device(TYPE if device is None else device).index
    return accelerator.current if index is None else index


def _empty(
    size: Any, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
    memory_format: Any = None,
) -> torch.Tensor:  # fmt: skip
    stride = torch.empty(size, device="meta").stride()
    return _empty_strided(size, stride, dtype=dtype, device=device)


def _empty_strided(
    size: Any, stride: Any, *, dtype: Any = None, layout: Any = None, device: Any = None,
    pin_memory: Any = None,
) -> torch.Tensor:  # fmt: skip
    dtype = dtype or torch.get_default_dtype()
    items = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride))
    flat = _allocate(items * dtype.itemsize, _index_of(device))
    return flat.view(dtype).as_strided(size, stride)


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> Any:
    on_host(target).copy_(on_host(source))
    return target


def _like_cpu(name: str, overload: str) -> Callable[..., Any]:
    op = getattr(getattr(torch.ops.aten, name), overload)
    return lambda *args, **kwargs: op.redispatch(_CPU, *args, **kwargs)


def _on_memory(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any other operator: the CPU's, on the same memory."""
    originals: dict[int, torch.Tensor] = {}
    hosts: list[torch.Tensor] = []

    def to_host(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type == TYPE:
            host = on_host(value)
            hosts.append(host)
            originals[id(host)] = value
            return host
        if isinstance(value, (list, tuple)):
            return type(value)(to_host(item) for item in value)
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def back(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) in originals:
                return originals[id(value)]
            device = next(iter(originals.values())).device if originals else TYPE
            made = _empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
            on_host(made).copy_(value)
            return made
        return type(value)(map(back, value)) if isinstance(value, (list, tuple)) else value

    host_args = [to_host(arg) for arg in args]
    host_kwargs = {name: to_host(value) for name, value in kwargs.items()}
    result = op(*host_args, **host_kwargs)
    for host in hosts:
        original = originals[id(host)]
        if host.size() != original.size():  # an output that the operator resized
            size, stride = host.size(), host.stride()
            made = _empty_strided(size, stride, dtype=host.dtype, device=original.device)
            on_host(made).copy_(host)
            original.set_(made.untyped_storage(), 0, size, stride)
    return back(result)


# Streams.


class Stream:
    """Runs jobs in order, on a thread of its own, and late: each burst of them after a rest."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="fakegpu", daemon=True).start()

    def give(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def _run(self) -> None:
        while True:
            is_resting = self._jobs.empty()
            job = self._jobs.get()
            if is_resting:
                time.sleep(_LATE_S)
            job()


class Event:
    """See ``accelerators.base.Event``.

    Args:
        stream: Records it there at once; None: ``record`` does so later.
        kept: Lives until the event is reached.
    """

    def __init__(self, stream: Stream | None = None, kept: Any = None):
        self._reached = threading.Event()
        self._kept = kept
        if stream is not None:
            self.record(stream)

    def record(self, stream: Stream) -> None:
        stream.give(self._reach)

    def _reach(self) -> None:
        self._kept = None
        self._reached.set()

    def is_reached(self) -> bool:
        return self._reached.is_set()

    def wait(self, timeout_s: float) -> None:
        if not self._reached.wait(timeout_s):
            raise TimeoutError(f"fakegpu did not finish within {timeout_s:g} s")

    def order(self) -> None:
        accelerator.stream().give(self._reached.wait)  # type: ignore[arg-type]


class Sharing:
    """See ``accelerators.base.Sharing``.

    Attributes:
        visible: Which devices this process sees.
        peers: Whether the two devices reach each other.
        broken: Why nothing can be shared; "" if it can.
        live: Buffers of other processes that are open here.
        shared, revoked: How often.
    """

    def __init__(self) -> None:
        self.visible = {0, 1}
        self.peers = True
        self.broken = ""
        self.live = 0
        self.shared = self.revoked = 0

    def identity(self, device: torch.device) -> str:
        return f"fake-{device.index}"

    def find(self, identity: str) -> torch.device | None:
        index = int(identity.removeprefix("fake-"))
        return torch.device(TYPE, index) if index in self.visible else None

    def can_copy(self, target: torch.device, source: torch.device) -> bool:
        return self.peers or target == source

    def share(self, buffer: torch.Tensor) -> tuple[dict[str, Any], Any]:
        if self.broken:
            raise RuntimeError(self.broken)
        address = buffer.untyped_storage().data_ptr()
        self.shared += 1
        handle = {
            "path": f"/proc/{os.getpid()}/fd/{_memory[address][1]}",
            "size": buffer.untyped_storage().nbytes(),
            "offset": buffer.data_ptr() - address,
            "nbytes": buffer.numel(),
        }
        return handle, None

    def open(self, handle: dict[str, Any], device: torch.device) -> torch.Tensor:
        try:
            descriptor = os.open(handle["path"], os.O_RDWR)
        except OSError as error:
            raise RuntimeError(str(error)) from error
        address = _map(handle["size"], descriptor, -1)
        os.close(descriptor)
        opened = _tensor_at(address, handle["size"], device.index)
        self.live += 1
        weakref.finalize(opened.untyped_storage(), self._closed)
        return opened[handle["offset"] : handle["offset"] + handle["nbytes"]]

    def revoke(self, handle: dict[str, Any]) -> None:
        self.revoked += 1

    def _closed(self) -> None:
        self.live -= 1


class FakeAccelerator:
    """See ``accelerators.base.Accelerator``.

    Attributes:
        current: The index of the current device.
        missing: Why there is no such device in this process; "" if there is.
        copies: How many copies it was given.
        gate: What copies wait for, if anything.
        pins: Addresses of mapped memory that is pinned.
        pin_error: Why none can be; "" if it can.
    """

    device_type = TYPE
    transports = (f"{TYPE}_ipc",)

    def __init__(self) -> None:
        self.sharing = Sharing()
        self.current = 0
        self.missing = ""
        self.copies = 0
        self.gate: threading.Event | None = None
        self.pins: set[int] = set()
        self.pin_error = ""
        self._local = threading.local()
        self._default = Stream()
        self._side_streams: SideStreams[Stream] = SideStreams()

    def stream(self) -> Stream:
        """This thread's current stream."""
        return getattr(self._local, "stream", self._default)

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.stream(), stream
        try:
            yield
        finally:
            self._local.stream = before

    def new_stream(self, device: torch.device) -> Stream:
        return Stream()

    def unavailable(self) -> str:
        return self.missing

    def current_device(self) -> torch.device:
        return torch.device(TYPE, self.current)

    def segment(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        return tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()

    def record(self, device: torch.device) -> Event:
        return Event(self.stream())

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        if self.pin_error:
            raise RuntimeError(self.pin_error)
        address = memory.data_ptr()
        self.pins.add(address)

        def undo() -> None:
            ctypes.string_at(address, 1)  # ends the process if the memory is unmapped already
            self.pins.remove(address)

        return undo

    def copy(self, pairs: Any, device: torch.device, after: Any = ()) -> Event:
        for tensor in (tensor for pair in pairs for tensor in pair):
            assert tensor.device in (device, torch.device("cpu")), tensor.device
        event = Event(kept=list(pairs))

        def begin(side: Stream) -> None:
            with self.on(side):
                for earlier in after:
                    earlier.order()
                if self.gate is not None:
                    side.give(partial(self.gate.wait, 60))
            for target, source in pairs:
                self.copies += 1
                side.give(lambda t=target, s=source: _copy_from(s, t))
            event.record(side)

        direction = tuple(tensor.is_cpu for tensor in pairs[0]) if pairs else ()
        run = self._side_streams.run(
            (device, direction), lambda: self.new_stream(device), event, begin
        )
        assert isinstance(run, Event)
        return run


def launch(tensor: torch.Tensor, value: float, gate: threading.Event | None = None) -> None:
    """Has the current stream fill a tensor, once the gate is open."""
    host = on_host(tensor.detach())

    def job(kept: torch.Tensor = tensor) -> None:
        if gate is not None:
            gate.wait(60)
        host.fill_(value)

    accelerator.stream().give(job)


def make_ipc(session: Any) -> Any:
    """The transport "fakegpu_ipc": what cuda_ipc is, over this device."""
    from ray.experimental.rdt.transports.cuda_ipc import DeviceIpcTransport

    return DeviceIpcTransport(session, TYPE)


class _Module(backend_registration._DummyBackendModule):
    def device_count(self) -> int:
        return 2


accelerator = FakeAccelerator()
backend_registration._setup_privateuseone_for_python_backend(TYPE, _Module())
_aten, _all = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
_aten.impl("empty.memory_format", _empty, "PrivateUse1")
_aten.impl("empty_strided", _empty_strided, "PrivateUse1")
_aten.impl("_copy_from", _copy_from, "PrivateUse1")
for _name, _overload in (
    ("view", "default"),
    ("as_strided", "default"),
    ("_reshape_alias", "default"),
    ("set_", "source_Storage_storage_offset"),
    ("set_", "source_Storage"),
):
    _full = _name if _overload == "default" else f"{_name}.{_overload}"
    _aten.impl(_full, _like_cpu(_name, _overload), "PrivateUse1")
_all.fallback(_on_memory, "PrivateUse1")
accelerators.register(accelerator)
transports._FACTORIES[f"{TYPE}_ipc"] = (__name__, "make_ipc")
