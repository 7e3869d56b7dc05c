"""Pinned host memory that the processes of one host share.

The producer copies a chunk into a slot. A consumer on the same host maps the slot once and copies
from it, so no copy within host memory is made. A slot is a memfd, which a consumer
opens as ``/proc/<pid>/fd/<number>``; the kernel allows that to processes of the same user.

If the connection to a reader breaks, its slot may be reused before the reader has read it. A slot
ends with the number of its current use, so that the reader can detect this.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.common.once import Once

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.accelerators.base import Accelerator

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SlotLost(TransferFailed):
    """The producer reused a slot before this process had read it."""

    code = "broken"


class Slot:
    """One slot at its producer, with ``memory``, its bytes.

    Raises:
        OSError: there is no such memory here.
        RuntimeError: the devices cannot use it.
    """

    def __init__(self, slots: Slots, nbytes: int, accelerator: Accelerator):
        self._slots = slots
        name = f"rdt-{secrets.token_hex(16)}"
        self._descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self._descriptor)
        # Reserved now: a lack of memory is an error here, and a signal later.
        os.posix_fallocate(self._descriptor, 0, nbytes + mmap.PAGESIZE)
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self.memory, self._uses = _map(self._descriptor, nbytes, accelerator)
        self._place = {"pid": os.getpid(), "fd": self._descriptor, "name": name, "nbytes": nbytes}

    def begin_use(self) -> None:
        """Invalidate the slot for earlier readers."""
        self._uses[0] += 1

    def describe(self) -> dict[str, Any]:
        """Describe the slot in its current use for consumers."""
        return {**self._place, "use": self._uses[0]}

    def give_back(self) -> None:
        """End the use. Runs on: any thread."""
        self._slots.give_back(self)


class Slots:
    """Up to ``limit`` slots of one producer, made on demand. Thread-safe."""

    def __init__(self, limit: int, nbytes: int, accelerator: Accelerator):
        self._limit = limit
        self._nbytes = nbytes
        self._accelerator = accelerator
        self._changed = threading.Condition()
        self._free: list[Slot] = []
        self._made = 0

    def take(self, timeout_s: float) -> Slot | None:
        """Return a free slot; None if there is none in time, or no slot can be made.

        Runs on: producer, a thread that may block. Raises as ``Slot`` where one cannot be made. No
        later call tries again.
        """
        deadline = Deadline.after(timeout_s)
        slot = None
        with self._changed:
            while not self._free and self._made >= self._limit:
                left = deadline.left_s() if self._limit else 0.0
                if left <= 0 or not self._changed.wait(left):
                    return None
            if self._free:
                slot = self._free.pop()
            else:
                self._made += 1
        slot = slot if slot is not None else self._make()
        slot.begin_use()
        return slot

    def _make(self) -> Slot:
        try:
            return Slot(self, self._nbytes, self._accelerator)
        except (OSError, RuntimeError):
            with self._changed:
                self._made -= 1
                self._limit = self._made
            raise

    def give_back(self, slot: Slot) -> None:
        """Undo one ``take``. Runs on: any thread."""
        with self._changed:
            self._free.append(slot)
            self._changed.notify_all()


@dataclass(frozen=True)
class Mapped:
    """One use of a producer's slot at a consumer, with ``memory``, its bytes."""

    memory: torch.Tensor
    _uses: memoryview
    _use: int

    def check(self) -> None:
        """Raise SlotLost if the slot was reused, so that the bytes read may be wrong."""
        if self._uses[0] != self._use:
            raise SlotLost("the producer took back a chunk that this process had not read yet")


class Mappings:
    """Other processes' slots, mapped by this one. Thread-safe.

    They stay mapped until ``forget``: a producer uses a few slots again and again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[bytes, str], Once[tuple[torch.Tensor, memoryview]]] = {}

    def open(
        self, owner: bytes, described: dict[str, Any], accelerator: Accelerator, deadline: Deadline
    ) -> Mapped:
        """Return the slot that ``owner``, the producer's agent, described.

        Runs on: consumer, the fetching thread.

        Raises:
            StillBeingMade: Another thread was still opening it at the deadline.
            OSError: This process may not open it.
            RuntimeError: It does not exist, or the devices cannot use it.
        """
        entry = owner, described["name"]
        with self._lock:
            known = self._known.setdefault(entry, Once())
        mapped = known.get(lambda: _open(described, accelerator), deadline)
        return Mapped(*mapped, described["use"])

    def forget(self, owner: bytes) -> None:
        """Unmap the slots of a producer, each when its last copy has ended. May block."""
        with self._lock:
            entries = [entry for entry in self._known if entry[0] == owner]
            gone = [self._known.pop(entry) for entry in entries]
        gone.clear()  # without the lock, because this unpins them


def _open(described: dict[str, Any], accelerator: Accelerator) -> tuple[torch.Tensor, memoryview]:
    path = f"/proc/{described['pid']}/fd/{described['fd']}"
    _check_name(path, described["name"])
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        _check_name(f"/proc/self/fd/{descriptor}", described["name"])
        return _map(descriptor, described["nbytes"], accelerator)
    finally:
        os.close(descriptor)


def _check_name(path: str, name: str) -> None:
    """Check the name: a process of another PID namespace has another PID here."""
    if name not in os.readlink(path):
        raise RuntimeError(f"{path} is not the producer's memory")


def _map(descriptor: int, nbytes: int, accelerator: Accelerator) -> tuple[torch.Tensor, memoryview]:
    """Map a slot: its bytes and the number of its use. The last tensor over it unmaps it."""
    import torch

    mapping = mmap.mmap(descriptor, nbytes + mmap.PAGESIZE)
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    undo: Callable[[], None] = accelerator.pin(whole)
    weakref.finalize(whole.untyped_storage(), undo).atexit = False
    return whole[:nbytes], memoryview(mapping)[nbytes : nbytes + 8].cast("Q")
