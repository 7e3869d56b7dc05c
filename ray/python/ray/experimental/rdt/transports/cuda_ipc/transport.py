"""cuda_ipc: GPU memory of one host, mapped by the consumer and copied, or used where it is.

The consumer maps the producer's memory on its own GPU and copies it into its own. The memory stays
mapped until the object goes, since mapping may take longer than the copy. The consumer need not
see the producer's GPU. A consumer that named this transport and uses the producer's GPU
gets the memory itself (``Lending``): what one side writes, the other sees. The producer keeps the
memory until the consumer's last tensor over it has died, or its process has ended; see ``loans``.

The vendor's calls are in ``accelerators.cuda_sharing``. They have not run on a GPU so far; what is
here is tested with another accelerator.

Requests (JSON, through the session):

* ``rdt.<name>.share`` {exposure, loan, pid, address, timeout_s}: answers with where the buffers
  lie.
* ``rdt.<name>.gone`` {exposure}: the object is not stored any more; the consumer unmaps it.
* ``rdt.<name>.keep`` {loan}: the consumer uses the memory from now on, without a deadline.
* ``rdt.<name>.close`` {loan}: the consumer has unmapped it.

Where buffers lie travels as a list of segments and two arrays in base64: for each buffer its
segment (uint32) and its place in that (uint64).
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
from array import array
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.base import Accelerator, CannotShare, Event, have_ended
from ray.experimental.rdt.accelerators.shared_memory import Layout, Mapping, Segment, SharedMemory
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import note_still_writing
from ray.experimental.rdt.common.real_threads import Empty, SimpleQueue
from ray.experimental.rdt.rpc.session import CallError, Session
from ray.experimental.rdt.transports.base import Capabilities, Peer, Route, TransportUnavailable
from ray.experimental.rdt.transports.cuda_ipc.loans import Loans

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ray.rdt")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")

#: How long a failed read waits for copies that are still under way.
_GRACE_S = 5.0

#: How long ``close`` waits for memory to be unmapped.
_CLOSE_S = 2.0

#: How often the closing thread looks whether work over memory that died has ended.
_SETTLE_S = 0.05

Buffers = Sequence["torch.Tensor"]

#: What this process has lent, also in sessions that have ended.
_loans: WeakKeyDictionary[SharedMemory, Loans] = WeakKeyDictionary()


@dataclass
class _Use:
    """Memory of a producer that this process uses.

    Attributes:
        peer: The producer.
        loan: Our name for its duty to keep the memory.
        mappings: Of its segments.
        events: When these are reached, nothing here uses the memory any more.
    """

    peer: Peer
    loan: str = field(default_factory=lambda: os.urandom(16).hex())
    mappings: list[Mapping] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


@dataclass
class _Source:
    """An object of a producer that is mapped here, for all reads of it until it goes.

    Attributes:
        exposure: The producer's number for it.
        use: What is mapped of it.
        layout: Where its buffers lie.
        starts: For each device of this process, where the object's segments are mapped.
        readers: How many reads use it now.
        is_over: Whether the last of them gives it back.
    """

    exposure: int
    use: _Use
    layout: Layout
    starts: defaultdict[torch.device, dict[int, int]] = field(
        default_factory=lambda: defaultdict(dict)
    )
    readers: int = 0
    is_over: bool = False


class DeviceIpcTransport:
    """Moves bytes between devices of one type on one host, or lends them. Thread-safe.

    See ``base.OneSided`` and ``base.Lending``.

    Args:
        session: Brings the requests.
        device_type: The type.

    Raises:
        TransportUnavailable: this process has no such device.
    """

    def __init__(self, session: Session, device_type: str):
        self._name = name = f"{device_type}_ipc"
        self.capabilities = Capabilities(
            name, frozenset({device_type}), two_sided=False, lends=True
        )
        accelerator = accelerators.of(device_type)
        if accelerator is None or accelerator.unavailable() or accelerator.sharing is None:
            reason = accelerator.unavailable() if accelerator is not None else "no such device"
            raise TransportUnavailable(f"{name} cannot be used: {reason or 'nothing to share'}")
        self._accelerator: Accelerator = accelerator
        self._memory: SharedMemory = accelerator.sharing
        self._session = session
        self._place = _place()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._exposed: dict[int, Buffers] = {}
        # By exposure, the agents of the consumers that have it mapped, and their addresses.
        self._readers: defaultdict[int, dict[bytes, bytes]] = defaultdict(dict)
        # By the producer's agent and its exposure.
        self._sources: defaultdict[bytes, dict[int, _Source]] = defaultdict(dict)
        self._loans = _loans.setdefault(accelerator.sharing, Loans())
        self._is_closed = False
        self._uses = 0
        self._dying: SimpleQueue[_Use | threading.Event | None] = SimpleQueue()
        self._closer: threading.Thread | None = None
        session.serve(f"rdt.{name}.share", self._on_share)
        session.serve(f"rdt.{name}.keep", self._on_keep)
        session.serve(f"rdt.{name}.close", self._on_close)
        session.serve(f"rdt.{name}.gone", self._on_gone)
        session.on_peer_lost(self._on_peer_lost)
        session.on_tick(self._on_tick)

    # Producer.

    def expose(self, buffers: Buffers) -> Route:
        """See ``OneSided``. Nothing is shared before a consumer of this host asks."""
        self._check_devices(buffers)
        with self._lock:
            number = next(self._numbers)
            self._exposed[number] = buffers
        return {"exposure": number, "place": self._place}

    def _check_devices(self, buffers: Buffers) -> None:
        (device_type,) = self.capabilities.devices
        if any(buffer.device.type != device_type for buffer in buffers):
            raise TransportUnavailable(f"{self._name} carries {device_type} memory only")

    def withdraw(self, exposed: Route) -> None:
        """See ``OneSided``. The memory is kept until its consumers have unmapped it."""
        number = exposed["exposure"]
        with self._lock:
            self._exposed.pop(number, None)
            readers = self._readers.pop(number, {})
        for address in readers.values():
            self._session.send_oneway(address, f"rdt.{self._name}.gone", {"exposure": number})

    def close(self) -> None:
        """See ``OneSided``. What was lent and borrowed stays, since tensors outlive the session.

        What was mapped for copies is given back, if that does not take long.
        """
        with self._lock:
            producers = list(self._sources)
        for producer in producers:
            self._forget(producer)
        if producers and self._closer is not None:
            is_given_back = threading.Event()
            self._dying.put(is_given_back)
            is_given_back.wait(_CLOSE_S)
        self._is_closed = True
        self._dying.put(None)
        with self._lock:
            self._exposed.clear()
            self._readers.clear()

    def _on_share(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        with self._lock:
            buffers = self._exposed.get(body["exposure"])
        if buffers is None:
            raise _not_exposed()
        deadline = Deadline.after(float(body["timeout_s"]))
        described = self._describe(buffers)
        self._loans.add(body["loan"], peer_id, body["pid"], buffers, deadline)
        with self._lock:
            is_exposed = body["exposure"] in self._exposed
            if is_exposed:
                self._readers[body["exposure"]][peer_id] = bytes.fromhex(body["address"])
        if not is_exposed:
            self._loans.end(body["loan"])
            raise _not_exposed()
        return described

    def lend(
        self,
        peer_id: bytes,
        asked: Route,
        buffers: Buffers,
        events: Sequence[Event],
        deadline: Deadline,
    ) -> Route:
        """See ``Lending``."""
        if asked["place"] != self._place:
            raise TransportUnavailable("the consumer is on another host or in another container")
        self._check_devices(buffers)
        devices = {buffer.device for buffer in buffers}
        others = {self._memory.identity(device) for device in devices} - {asked["device"]}
        if others:
            raise TransportUnavailable(f"the memory is on {sorted(others)}, the consumer is not")
        described = self._describe(buffers)
        pending = [event for event in events if not event.is_reached()]
        try:
            exported = [self._memory.export_event(event) for event in pending]
        except CannotShare as error:
            raise TransportUnavailable(f"events cannot be shared: {error}") from error
        kept = [*buffers, *(kept for _, kept in exported)]
        self._loans.add(asked["loan"], peer_id, asked["pid"], kept, deadline)
        return {**described, "events": [b64encode(handle).decode() for handle, _ in exported]}

    def _describe(self, buffers: Buffers) -> Route:
        try:
            layout = self._memory.describe(buffers)
        except CannotShare as error:
            raise TransportUnavailable(f"this memory cannot be shared: {error}") from error
        return _encode(layout)

    def _on_keep(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        self._loans.confirm(body["loan"])
        return {}

    def _on_close(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        self._loans.end(body["loan"])
        return {}

    # Consumer: a copy.

    def read(
        self,
        peer: Peer,
        exposed: Route,
        buffers: Buffers,
        deadline: Deadline,
        after: Sequence[Event] = (),
    ) -> None:
        """See ``OneSided``. Memory that a copy still reads stays mapped until that has ended."""
        if exposed["place"] != self._place:
            raise TransportUnavailable("the producer is on another host or in another container")
        if any(buffer.is_cpu for buffer in buffers):
            raise TransportUnavailable(
                f"{self._name} writes device memory only, and the tensors go to host memory"
            )
        source = self._source(peer, exposed["exposure"], deadline)
        copies: list[Event] = []
        try:
            self._read(source, copies, buffers, deadline, after)
        except BaseException as error:
            source.is_over = True
            if not have_ended(copies, _GRACE_S):
                note_still_writing(error)
            raise
        finally:
            self._end_read(source, copies, deadline)

    def _source(self, peer: Peer, exposure: int, deadline: Deadline) -> _Source:
        """The object for one more read; its producer is asked where it is the first time."""
        with self._lock:
            known = self._sources.get(peer.agent_id, {}).get(exposure)
            if known is not None:
                known.readers += 1
                return known
        use = _Use(peer)
        body = {
            "exposure": exposure,
            "loan": use.loan,
            "pid": os.getpid(),
            "address": self._session.address.hex(),
            "timeout_s": _left(deadline),
        }
        try:
            op = f"rdt.{self._name}.share"
            answer = self._session.call(peer.address, op, body, _left(deadline))
        except BaseException as error:
            self.give_back(use)
            if isinstance(error, CallError) and error.code == TransportUnavailable.code:
                raise TransportUnavailable(str(error)) from error
            raise
        self._keep(use)
        source = _Source(exposure, use, _decode(answer), readers=1)
        with self._lock:
            # Of two threads that asked at once, one keeps its own for this read alone.
            source.is_over = self._sources[peer.agent_id].setdefault(exposure, source) is not source
        return source

    def _end_read(self, source: _Source, copies: Sequence[Event], deadline: Deadline) -> None:
        """Ends one read. After its deadline the producer may have said already that all is over."""
        pending = [copy for copy in copies if not have_ended([copy], 0)]
        with self._lock:
            source.readers -= 1
            source.use.events += pending
            source.is_over = source.is_over or deadline.has_passed()
            of_producer = self._sources.get(source.use.peer.agent_id, {})
            if source.is_over and of_producer.get(source.exposure) is source:
                del of_producer[source.exposure]
            is_last = source.is_over and not source.readers
        if is_last:
            self.give_back(source.use)

    def _forget(self, producer: bytes, exposure: int | None = None) -> None:
        """Unmaps an object of a producer, or all of them, once no read uses it."""
        with self._lock:
            of_producer = self._sources.get(producer, {})
            names = list(of_producer) if exposure is None else [exposure]
            sources = [of_producer.pop(name) for name in names if name in of_producer]
            if not of_producer:
                self._sources.pop(producer, None)
            for source in sources:
                source.is_over = True
            unused = [source.use for source in sources if not source.readers]
        for use in unused:
            self.give_back(use)

    def _on_gone(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: consumer, an rdt-call thread."""
        self._forget(peer_id, body["exposure"])
        return {}

    def _keep(self, use: _Use) -> None:
        """Tells the producer that its memory is used beyond the deadline."""
        self._session.send_oneway(use.peer.address, f"rdt.{self._name}.keep", {"loan": use.loan})

    def _read(
        self,
        source: _Source,
        copies: list[Event],
        buffers: Buffers,
        deadline: Deadline,
        after: Sequence[Event],
    ) -> None:
        """Copies an object into buffers; adds the copies that it begins to ``copies``."""
        layout, copied = source.layout, []
        for device in {buffer.device for buffer in buffers}:
            here = [i for i, b in enumerate(buffers) if b.device == device and b.numel()]
            starts = source.starts[device]
            self._map(layout, here, device, source.use, starts)
            pairs = []
            for i in here:
                address = starts[layout.indices[i]] + layout.offsets[i]
                memory = self._memory.tensor(address, buffers[i].numel(), device, source.use)
                pairs.append((buffers[i], memory))
            copied += pairs
            if pairs:
                copies.append(self._accelerator.copy(pairs, device, after))
        for copy in copies:
            copy.wait(_left(deadline))
        self._memory.check_owners([memory for _, memory in copied])

    def _map(
        self,
        layout: Layout,
        indices: Sequence[int],
        device: torch.device,
        use: _Use,
        starts: dict[int, int],
    ) -> None:
        """Maps the segments of some buffers that are not in ``starts`` yet, and adds them there."""
        for index in sorted({layout.indices[i] for i in indices} - starts.keys()):
            try:
                mapping = self._memory.map(layout.segments[index], device)
            except CannotShare as error:
                raise TransportUnavailable(
                    f"the producer's memory cannot be opened: {error}"
                ) from error
            use.mappings.append(mapping)
            starts[index] = mapping.address

    # Consumer: the memory itself.

    def borrow(self, device: torch.device) -> _Borrowing:
        """See ``Lending``."""
        asked = {
            "place": self._place,
            "device": self._memory.identity(device),
            "pid": os.getpid(),
        }
        return _Borrowing(self, device, asked)

    def take(
        self, use: _Use, lent: Route, sizes: Sequence[int], device: torch.device
    ) -> list[torch.Tensor]:
        """See ``Borrowing.take``. Runs on: consumer, the fetching thread."""
        layout = _decode(lent)
        starts: dict[int, int] = {}
        filled = [i for i, nbytes in enumerate(sizes) if nbytes]
        self._map(layout, filled, device, use, starts)
        try:
            events = [self._memory.import_event(b64decode(h), device) for h in lent["events"]]
        except CannotShare as error:
            raise TransportUnavailable(f"the producer's event cannot be opened: {error}") from error
        for event in events:
            event.order()
        self._keep(use)
        self._count_use()
        lease = _Lease(self, use, device, events)
        tensors = [
            self._memory.tensor(
                starts[layout.indices[i]] + layout.offsets[i], nbytes, device, lease
            )
            if nbytes
            else self._accelerator.empty(0, device)
            for i, nbytes in enumerate(sizes)
        ]
        self._memory.check_owners(tensors)
        return tensors

    def on_death(self, use: _Use, device: torch.device) -> None:
        """The last tensor over borrowed memory has died.

        Runs on: the thread that let it go, whose stream may still have work over the memory. It may
        be anywhere in its code, with any lock taken: this takes none.
        """
        use.events = [self._accelerator.record(device)]
        self._dying.put(use)

    def give_back(self, use: _Use) -> None:
        """Unmaps memory and tells the producer. Runs on: consumer, any thread; returns at once."""
        self._count_use()
        self._dying.put(use)

    def _count_use(self) -> None:
        """Has the closing thread run until one more use has ended."""
        with self._lock:
            self._uses += 1
            if self._closer is None:
                name = f"rdt-{self._name}-close"
                self._closer = threading.Thread(target=self._close_uses, name=name)
                self._closer.start()

    def _close_uses(self) -> None:
        """Ends the uses of memory whose work has ended.

        Runs on: the closing thread, since unmapping may block until a device has come to rest. It
        ends after the transport, with the last tensor over borrowed memory.
        """
        waiting: list[_Use] = []
        while not (self._is_closed and self._uses == 0):
            dying = None
            with suppress(Empty):
                dying = self._dying.get(timeout=_SETTLE_S if waiting else None)
            if isinstance(dying, _Use):
                waiting.append(dying)
            waiting = [use for use in waiting if not self._try_to_close(use)]
            if isinstance(dying, threading.Event):
                dying.set()

    def _try_to_close(self, use: _Use) -> bool:
        if not have_ended(use.events, 0):
            return False
        use.events.clear()
        try:
            for mapping in use.mappings:
                mapping.release()
        except Exception:
            logger.warning("RDT could not unmap device memory", exc_info=True)
        use.mappings.clear()
        if not self._is_closed:
            body = {"loan": use.loan}
            self._session.send_oneway(use.peer.address, f"rdt.{self._name}.close", body)
        with self._lock:
            self._uses -= 1
        return True

    # Deaths.

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: the reaper thread."""
        self._loans.on_peer_lost(peer_id)
        self._forget(peer_id)
        self._say_what_is_lost()

    def _on_tick(self) -> None:
        """Runs on: the reaper thread."""
        self._loans.look_after()
        self._say_what_is_lost()

    def _say_what_is_lost(self) -> None:
        for pid in self._memory.lost():
            logger.error(
                "RDT: process %d has ended, which had allocated device memory that tensors of "
                "this process lie in (transport %r). What they hold is not known from now on: drop "
                "them.",
                *(pid, self._name),
            )


class _Lease:
    """Dies with the last tensor over borrowed memory, and then gives it back.

    Args:
        transport: Has borrowed it.
        use: What it has.
        device: Which the tensors are on.
        events: The producer's, which streams here wait for.
    """

    def __init__(
        self,
        transport: DeviceIpcTransport,
        use: _Use,
        device: torch.device,
        events: Sequence[Event],
    ):
        self._transport = transport
        self._use = use
        self._device = device
        self._events = events

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self._transport.on_death(self._use, self._device)


class _Borrowing:
    """See ``base.Borrowing``.

    Args:
        transport: Borrows.
        device: For which.
        asked: What the producer has to know of this process.
    """

    def __init__(self, transport: DeviceIpcTransport, device: torch.device, asked: Route):
        self._transport = transport
        self._device = device
        self._loan = os.urandom(16).hex()
        self._is_over = False
        self.asked = {**asked, "loan": self._loan}

    def take(self, peer: Peer, lent: Route, sizes: Sequence[int]) -> list[torch.Tensor]:
        """See ``base.Borrowing``."""
        self._is_over = True
        use = _Use(peer, self._loan)
        try:
            return self._transport.take(use, lent, sizes, self._device)
        except BaseException:
            self._transport.give_back(use)
            raise

    def abandon(self, peer: Peer) -> None:
        """See ``base.Borrowing``."""
        if not self._is_over:
            self._is_over = True
            self._transport.give_back(_Use(peer, self._loan))


class CudaIpcTransport(DeviceIpcTransport):
    """The transport that users name "cuda_ipc"."""

    def __init__(self, session: Session):
        super().__init__(session, "cuda")


def _not_exposed() -> CallError:
    return CallError("the object is not exposed here any more", "not_found")


def _encode(layout: Layout) -> Route:
    return {
        "segments": [
            [
                b64encode(segment.handle).decode(),
                segment.owner.hex(),
                segment.pid,
                segment.address,
                segment.nbytes,
                segment.device,
            ]
            for segment in layout.segments
        ],
        "indices": b64encode(layout.indices).decode(),
        "offsets": b64encode(layout.offsets).decode(),
    }


def _decode(route: Route) -> Layout:
    indices, offsets = array("I"), array("Q")
    indices.frombytes(b64decode(route["indices"]))
    offsets.frombytes(b64decode(route["offsets"]))
    segments = [
        Segment(b64decode(handle), bytes.fromhex(owner), *rest)
        for handle, owner, *rest in route["segments"]
    ]
    return Layout(segments, indices, offsets)


def _place() -> str:
    """What processes have in common that can map each other's memory and watch each other end.

    The running kernel, and the namespace in which it numbers processes.
    """
    return f"{_BOOT_ID.read_text().strip()} {_PID_NAMESPACE.stat().st_ino}"


def _left(deadline: Deadline) -> float:
    return deadline.left_s()
