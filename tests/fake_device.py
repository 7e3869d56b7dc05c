"""A device type that torch and RDT take for real: "fakegpu", two devices of it.

Its tensors are ordinary ``torch.Tensor``s of torch's privateuse1 key, so RDT treats them exactly as
those of a GPU. Their memory is host memory, which nobody but this module looks into; it is cut from
memfds, so that other processes can open it as they open GPU memory.

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

from ray.experimental.rdt import util
from ray.experimental.rdt._tensors import tensor_over
from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.events import SideStreams
from ray.experimental.rdt.accelerators.shared_memory import CannotShare, SharedMemory
from ray.experimental.rdt.transports import registry as transports

TYPE = "fakegpu"
_LATE_S = 2e-3
_SEGMENT_NBYTES = 1 << 20
_DLPACK_EXTENSION_DEVICE = 12

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


# Memory and tensors.


class _Segment:
    """What the driver gives out at once: a memfd, of which the allocator cuts blocks.

    Attributes:
        descriptor: The memfd, -1 once it is closed.
        address, nbytes: Where it is mapped here.
    """

    def __init__(self, nbytes: int):
        self.descriptor = os.memfd_create("fakegpu")
        os.ftruncate(self.descriptor, nbytes)
        self._mapping = mmap.mmap(self.descriptor, nbytes)
        self.address = ctypes.addressof(ctypes.c_uint8.from_buffer(self._mapping))
        self.nbytes = nbytes
        self.used = 0

    def __del__(self) -> None:
        _segments.pop(self.address, None)
        ctypes.memset(self.address, 0xFD, self.nbytes)  # as if given to others, who write to it
        with contextlib.suppress(BufferError):
            self._mapping.close()
        os.close(self.descriptor)


_segments: weakref.WeakValueDictionary[int, _Segment] = weakref.WeakValueDictionary()
_open_segments: dict[int, _Segment] = {}  # by device: where small blocks are cut from


def _cut(nbytes: int, index: int) -> tuple[_Segment, int]:
    """Memory for a block: in a segment with others if it is small."""
    if nbytes > _SEGMENT_NBYTES // 4:
        segment = _segments_add(_Segment(nbytes))
        return segment, 0
    aligned = -(-nbytes // 512) * 512
    segment = _open_segments.get(index)  # type: ignore[assignment]
    if segment is None or segment.used + aligned > segment.nbytes:
        segment = _open_segments[index] = _segments_add(_Segment(_SEGMENT_NBYTES))
    offset, segment.used = segment.used, segment.used + aligned
    return segment, offset


def _segments_add(segment: _Segment) -> _Segment:
    _segments[segment.address] = segment
    return segment


def _segment_of(address: int) -> _Segment | None:
    for segment in list(_segments.values()):
        if segment.address <= address < segment.address + segment.nbytes:
            return segment
    return None


def _allocate(nbytes: int, index: int) -> torch.Tensor:
    if not nbytes:
        return tensor_over(0, 0, _DLPACK_EXTENSION_DEVICE, index, None)
    segment, offset = _cut(nbytes, index)
    return tensor_over(segment.address + offset, nbytes, _DLPACK_EXTENSION_DEVICE, index, segment)


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor over the same memory, conjugate or negative as this one."""
    if tensor.is_cpu:
        return tensor
    storage = tensor.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    view = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    base = torch.frombuffer(view, dtype=torch.uint8).untyped_storage()
    shape = tensor.storage_offset(), tensor.size(), tensor.stride()
    host = torch.empty(0, dtype=tensor.dtype).set_(base, *shape)
    host = torch._conj(host) if tensor.is_conj() else host
    return torch._neg_view(host) if tensor.is_neg() else host


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
    if accelerator.is_late and not source.is_cpu and not target.is_cpu:
        accelerator.stream().give(partial(_copy_now, source, target))
    else:
        _copy_now(source, target)
    return target


def _copy_now(source: torch.Tensor, target: torch.Tensor) -> None:
    on_host(target).copy_(on_host(source))


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

    def make_stream_wait(self) -> None:
        accelerator.stream().give(self._reached.wait)  # type: ignore[arg-type]


class Sharing:
    """See ``accelerators.base.Sharing``. Its rules are those of CUDA IPC.

    A segment has one handle. The process that made it cannot open it, one that has opened it cannot
    pass it on, and opening it twice gives the same address.

    Args:
        process: The number under which a test takes part of its process for another one.

    Attributes:
        unreachable: Identities of devices that those of this process do not reach.
        broken: Why nothing can be shared; "" if it can.
        live: Segments of other processes that are open here.
        exported: How often a handle was given out.
        opened: How often a segment was mapped.
        rest: ``unmap`` waits for this, if anything.
    """

    dlpack_type = _DLPACK_EXTENSION_DEVICE

    def __init__(self, process: int = 0) -> None:
        self._process = process or os.getpid()
        self.unreachable: set[str] = set()
        self.broken = ""
        self.events_broken = ""
        self.exported = self.opened = 0
        self.rest: threading.Event | None = None
        self._mapped: dict[str, _Foreign] = {}

    @property
    def live(self) -> int:
        return len(self._mapped)

    def identity(self, device: torch.device) -> str:
        return f"fake-{device.index}"

    def unreachable_reason(self, device: torch.device, identity: str) -> str:
        is_near = identity == self.identity(device) or identity not in self.unreachable
        return "" if is_near else f"{device} cannot reach the memory of {identity}"

    def export(self, address: int, device: torch.device) -> tuple[bytes, int, int]:
        if self.broken:
            raise CannotShare(self.broken)
        segment = _segment_of(address)
        if segment is None:
            raise CannotShare("another process has allocated it")
        self.exported += 1
        return self._handle(segment), segment.address, segment.nbytes

    def _handle(self, segment: _Segment) -> bytes:
        inode = os.fstat(segment.descriptor).st_ino
        text = f"{self._process} {os.getpid()} {segment.descriptor} {inode} {segment.nbytes}"
        return text.encode().ljust(64)

    def map(self, handle: bytes, device: torch.device) -> int:
        process, pid, descriptor, inode, nbytes = handle.decode().split()
        if int(process) == self._process:
            raise CannotShare("invalid device context: this process has exported it")
        key = f"{pid} {inode}"
        if key not in self._mapped:
            try:
                opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR)
            except OSError as error:
                raise CannotShare(f"invalid resource handle: {error}") from error
            try:
                if os.fstat(opened).st_ino != int(inode):
                    raise CannotShare("invalid resource handle: it was freed")
                self._mapped[key] = _Foreign(mmap.mmap(opened, int(nbytes)))
            finally:
                os.close(opened)
        self.opened += 1
        self._mapped[key].uses += 1
        return self._mapped[key].address

    def unmap(self, address: int, device: torch.device) -> None:
        if self.rest is not None:
            assert self.rest.wait(60)
        (key,) = [key for key, each in self._mapped.items() if each.address == address]
        self._mapped[key].uses -= 1
        if not self._mapped[key].uses:
            with contextlib.suppress(BufferError):  # a tensor over it still lives
                self._mapped.pop(key).mapping.close()

    def export_event(self, event: Event) -> tuple[bytes, Any]:
        if self.events_broken:
            raise CannotShare(self.events_broken)
        flag = _Segment(mmap.PAGESIZE)
        stream = Stream()
        stream.give(partial(event.wait, 60))
        stream.give(lambda: ctypes.memset(flag.address, 1, 1))
        return self._handle(flag), flag

    def import_event(self, handle: bytes, device: torch.device) -> Event:
        _, pid, descriptor, _, _ = handle.decode().split()
        with open(f"/proc/{pid}/fd/{descriptor}", "r+b") as opened:
            flag = mmap.mmap(opened.fileno(), mmap.PAGESIZE)
        event, stream = Event(), Stream()

        def reached() -> None:
            until = time.monotonic() + 60
            while not flag[0] and time.monotonic() < until:
                time.sleep(1e-3)

        stream.give(reached)
        event.record(stream)
        return event


class _Foreign:
    """A segment of another process."""

    def __init__(self, mapping: mmap.mmap):
        self.mapping = mapping
        self.address = ctypes.addressof(ctypes.c_uint8.from_buffer(mapping))
        self.uses = 0


class FakeAccelerator:
    """See ``accelerators.base.Accelerator``.

    Attributes:
        current: The index of the current device.
        missing: Why there is no such device in this process; "" if there is.
        copies: How many copies it was given.
        gate: What copies wait for, if anything.
        is_late: Whether torch's copies between devices run on the current stream.
        pin_error: Why none can be; "" if it can.
    """

    device_type = TYPE
    transports = (f"{TYPE}_ipc",)

    def __init__(self) -> None:
        self.sharing = SharedMemory(Sharing())
        self.current = 0
        self.missing = ""
        self.copies = 0
        self.gate: threading.Event | None = None
        self.is_late = False
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

    def unavailable_reason(self) -> str:
        return self.missing

    def current_device(self) -> torch.device:
        return torch.device(TYPE, self.current)

    def segment(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        segment = _segment_of(tensor.untyped_storage().data_ptr())
        return None if segment is None else (segment.address, segment.nbytes)

    def record(self, device: torch.device) -> Event:
        return Event(self.stream())

    def capture_safe(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, memory: torch.Tensor) -> Callable[[], None]:
        if self.pin_error:
            raise RuntimeError(self.pin_error)
        address = memory.data_ptr()

        def undo() -> None:
            ctypes.string_at(address, 1)  # ends the process if the memory is unmapped already

        return undo

    def copy(self, pairs: Any, device: torch.device, after: Any = ()) -> Event:
        for tensor in (tensor for pair in pairs for tensor in pair):
            assert tensor.device in (device, torch.device("cpu")), tensor.device
        event = Event(kept=list(pairs))

        def begin(side: Stream) -> None:
            with self.on(side):
                for earlier in after:
                    earlier.make_stream_wait()
                if self.gate is not None:
                    side.give(partial(self.gate.wait, 60))
            for target, source in pairs:
                self.copies += 1
                side.give(partial(_copy_now, source, target))
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
    from ray.experimental.rdt.transports.cuda_ipc.transport import DeviceIpcTransport

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
# torch resolves a conjugate or negative tensor by a copy, which must not ask for that again.
for _key in ("Conjugate", "Negative"):
    _aten.impl("_copy_from", torch.library.fallthrough_kernel, _key)
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
util.BUILT_IN_TRANSPORTS = (*util.BUILT_IN_TRANSPORTS, f"{TYPE}_ipc".upper())
