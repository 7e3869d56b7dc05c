"""cuda_ipc: GPU memory of one host, copied straight from the producer's GPU to the consumer's.

The consumer opens the producer's memory, copies it into its own and closes it. It serves a pair if
both are on one host, the consumer sees the producer's GPU (Ray hides all but an actor's own, so
that the two then share one GPU), and its own GPU can reach that one.

Each read is given handles of its own, as torch's reference counts want it, and the object is kept
for as long as anybody reads. The vendor's calls are in ``accelerators.cuda_sharing``; they have not
run on a GPU so far, what is here is tested with another accelerator.

Requests (JSON, through the session):

* ``rdt.<name>.share`` {exposure}: answers with a handle for each buffer, null for an empty one, and
  the number of this share.
* ``rdt.<name>.close`` {share, opened}: the consumer has closed what it opened, which was so many of
  the handles, from the first.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators.base import (
    Accelerator,
    Event,
    Handle,
    Sharing,
    have_ended,
)
from ray.experimental.rdt.session import CallError, Session
from ray.experimental.rdt.transports.base import Capabilities, Peer, Route, TransportUnavailable

if TYPE_CHECKING:
    import torch

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

#: How long a failed read waits for copies that are still under way.
_GRACE_S = 5.0

Buffers = Sequence["torch.Tensor"]


@dataclass(frozen=True)
class _Share:
    """Handles that one reader was given, and what has to be kept until it has closed them."""

    reader: bytes
    handles: list[Handle]
    kept: list[Any]


@dataclass
class _Reading:
    """What one read has opened of the producer's, and the copies out of it.

    Attributes:
        producer: The address of its agent.
        share: The producer's number for the handles.
        pairs: The user's buffers, and the producer's that were opened for them.
        copies: Those that were begun and not waited for.
    """

    producer: bytes
    share: int
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    copies: list[Event] = field(default_factory=list)


class DeviceIpcTransport:
    """Moves bytes between devices of one type on one host. See ``base.OneSided``. Thread-safe.

    Args:
        session: Brings the requests.
        device_type: The type.

    Raises:
        TransportUnavailable: this process has no such device.
    """

    def __init__(self, session: Session, device_type: str):
        name = f"{device_type}_ipc"
        self.capabilities = Capabilities(
            name, frozenset({device_type}), two_sided=False, same_host=True
        )
        accelerator = accelerators.of(device_type)
        if accelerator is None or accelerator.unavailable() or accelerator.sharing is None:
            reason = accelerator.unavailable() if accelerator is not None else "no such device"
            raise TransportUnavailable(f"{name} cannot be used: {reason or 'nothing to share'}")
        self._accelerator: Accelerator = accelerator
        self._sharing: Sharing = accelerator.sharing
        self._session = session
        self._boot_id = _BOOT_ID.read_text().strip()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._exposed: dict[int, Buffers] = {}
        self._shares: dict[int, _Share] = {}
        self._hung: list[_Reading] = []
        session.serve(f"rdt.{name}.share", self._on_share)
        session.serve(f"rdt.{name}.close", self._on_close)
        session.on_peer_lost(self._on_peer_lost)

    # Producer.

    def expose(self, buffers: Buffers) -> Route:
        """See ``OneSided``. Nothing is shared before a consumer of this host asks."""
        (device_type,) = self.capabilities.devices
        if any(buffer.device.type != device_type for buffer in buffers):
            raise TransportUnavailable(
                f"{self.capabilities.name} carries {device_type} memory only"
            )
        identities = [self._sharing.identity(buffer.device) for buffer in buffers]
        with self._lock:
            number = next(self._numbers)
            self._exposed[number] = buffers
        return {"exposure": number, "boot_id": self._boot_id, "devices": identities}

    def withdraw(self, exposed: Route) -> None:
        """See ``OneSided``."""
        with self._lock:
            self._exposed.pop(exposed["exposure"], None)

    def close(self) -> None:
        """See ``OneSided``."""
        with self._lock:
            self._exposed.clear()
            self._shares.clear()

    def _on_share(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        with self._lock:
            buffers = self._exposed.get(body["exposure"])
        if buffers is None:
            raise CallError("the object is not exposed here any more", "not_found")
        share = _Share(peer_id, [], [])
        try:
            handles = [self._share(buffer, share) for buffer in buffers]
        except RuntimeError as error:
            self._revoke(share.handles)
            raise TransportUnavailable(f"this memory cannot be shared: {error}") from error
        with self._lock:
            number = next(self._numbers)
            self._shares[number] = share
        return {"share": number, "handles": handles}

    def _share(self, buffer: torch.Tensor, share: _Share) -> Handle | None:
        if not buffer.numel():
            return None
        handle, kept = self._sharing.share(buffer)
        share.handles.append(handle)
        share.kept.append(kept)
        return handle

    def _on_close(self, peer_id: bytes, body: dict[str, Any]) -> dict[str, Any]:
        """Runs on: producer, an rdt-call thread."""
        with self._lock:
            share = self._shares.pop(body["share"], None)
        if share is not None:
            self._revoke(share.handles[body["opened"] :])
        return {}

    def _on_peer_lost(self, peer_id: bytes) -> None:
        """Runs on: producer, the reaper thread."""
        with self._lock:
            lost = [n for n, share in self._shares.items() if share.reader == peer_id]
            shares = [self._shares.pop(number) for number in lost]
        for share in shares:
            self._revoke(share.handles)

    def _revoke(self, handles: Sequence[Handle]) -> None:
        for handle in handles:
            self._sharing.revoke(handle)

    # Consumer.

    def read(
        self,
        peer: Peer,
        exposed: Route,
        buffers: Buffers,
        deadline: float,
        after: Sequence[Event] = (),
    ) -> None:
        """See ``OneSided``. A copy that outlasts the read is looked after by later ones."""
        self._look_after_hung()
        sources = self._sources(exposed, buffers)
        name = f"rdt.{self.capabilities.name}"
        body = {"exposure": exposed["exposure"]}
        try:
            answer = self._session.call(peer.address, f"{name}.share", body, _left(deadline))
        except CallError as error:
            if error.code == TransportUnavailable.code:
                raise TransportUnavailable(str(error)) from error
            raise
        reading = _Reading(peer.address, answer["share"])
        try:
            self._open(answer["handles"], sources, buffers, reading)
            self._copy(reading, deadline, after)
        except BaseException as error:
            has_ended = have_ended(reading.copies, _GRACE_S)
            error.may_still_write = not has_ended  # type: ignore[attr-defined]
            raise
        finally:
            self._end(reading)

    def _look_after_hung(self) -> None:
        """Ends the reads whose copies have come to their end since."""
        with self._lock:
            hung, self._hung = self._hung, []
        for reading in hung:
            self._end(reading)

    def _end(self, reading: _Reading) -> None:
        """Closes what was opened, unless a copy still reads it."""
        if not have_ended(reading.copies, 0):
            with self._lock:
                self._hung.append(reading)
            return
        done = {"share": reading.share, "opened": len(reading.pairs)}
        reading.pairs.clear()  # what is opened is closed when nothing names it any more
        self._session.tell(reading.producer, f"rdt.{self.capabilities.name}.close", done)

    def _sources(self, exposed: Route, buffers: Buffers) -> list[torch.device]:
        """The producer's devices as this process sees them. Raises TransportUnavailable."""
        if exposed["boot_id"] != self._boot_id:
            raise TransportUnavailable("the producer is on another host")
        found = {name: self._find(name) for name in set(exposed["devices"])}
        sources = [found[name] for name in exposed["devices"]]
        for buffer, source in zip(buffers, sources):
            if not buffer.is_cpu and not self._sharing.can_copy(buffer.device, source):
                raise TransportUnavailable(f"{buffer.device} cannot reach the memory of {source}")
        return sources

    def _find(self, identity: str) -> torch.device:
        device = self._sharing.find(identity)
        if device is None:
            raise TransportUnavailable(
                f"this process does not see the producer's device {identity}; give both the same "
                "one, or let both see all (CUDA_VISIBLE_DEVICES)"
            )
        return device

    def _open(
        self,
        handles: Sequence[Handle | None],
        sources: Sequence[torch.device],
        buffers: Buffers,
        reading: _Reading,
    ) -> None:
        for handle, source, buffer in zip(handles, sources, buffers):
            if handle is not None:
                try:
                    here = source if buffer.is_cpu else buffer.device
                    reading.pairs.append((buffer, self._sharing.open(handle, here)))
                except RuntimeError as error:
                    raise TransportUnavailable(
                        f"the producer's memory cannot be opened: {error}"
                    ) from error

    def _copy(self, reading: _Reading, deadline: float, after: Sequence[Event]) -> None:
        for source in {source.device for _, source in reading.pairs}:
            here = [pair for pair in reading.pairs if pair[1].device == source]
            reading.copies.append(self._accelerator.copy(here, source, after))
        while reading.copies:
            reading.copies[0].wait(_left(deadline))
            reading.copies.pop(0)


class CudaIpcTransport(DeviceIpcTransport):
    """The transport that users name "cuda_ipc"."""

    def __init__(self, session: Session):
        super().__init__(session, "cuda")


def _left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())
