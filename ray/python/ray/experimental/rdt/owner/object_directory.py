"""An owner's records of its RDT objects: a pure state machine, event in, instructions out.

It uses no Ray, torch, thread or clock. The caller serializes access and carries out instructions.

Rows by object id (hex). Events come in any order that the core allows:

==================  ==========================  ==========================================
event               row before                  result
==================  ==========================  ==========================================
submitted           none                        row SUBMITTED
passed_to           CREATED                     Hint; once WarnShared if the producer has it
passed_to           SUBMITTED                   the same; the Hint follows when it is created
submitted           CREATED (early reply)       row gets the call's producer
created             none, a submit in flight    row CREATED, Own: the reply came before the ref
created             none, no submit in flight   freed before it was created: Free
created             SUBMITTED                   row CREATED, Own, Hint for each destination
created             CREATED (a retry)           Free of the old copy, Own of the new
created             any, value has the bytes    ReleaseHandle of the producer's handle
out_of_scope        SUBMITTED                   row gone, ReleaseHandle; a later created frees
out_of_scope        CREATED                     row gone, Free, ReleaseHandle
out_of_scope        none                        nothing: the object had no tensors
close               any                         as out_of_scope, for all rows
==================  ==========================  ==========================================

"A submit in flight": the core may deliver the reply of a task before ``.remote()`` has returned the
reference. So a caller brackets each submit with ``begin_submit`` and ``end_submit``. If all submits
that were in flight at an early reply have ended without naming its object, the object is freed.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.experimental.rdt.common.descriptor import Location


@dataclass(frozen=True)
class Free:
    """Instruction: tell the producer's agent that this key is no longer needed."""

    location: Location


@dataclass(frozen=True)
class Own:
    """Instruction: tell the producer's agent that this process owns the object."""

    object_id: str
    location: Location


@dataclass(frozen=True)
class Hint:
    """Instruction: tell an actor's agent that its next task will fetch this object."""

    actor_id: bytes
    location: Location


@dataclass(frozen=True)
class WarnShared:
    """Instruction: tell the user that an object's producer and another actor share it."""

    object_id: str


@dataclass
class ReleaseHandle:
    """Instruction: release the handle of the actor that made an object.

    A release may run code of Ray, so the handle can be passed to another thread.

    Attributes:
        is_last: True if the object is gone; False if only its producer is not needed any more.
    """

    handle: Any
    is_last: bool

    def take(self) -> Any:
        """Return the handle and drop it here."""
        handle, self.handle = self.handle, None
        return handle


Instruction = Free | Own | Hint | WarnShared | ReleaseHandle


class State(enum.Enum):
    """SUBMITTED: the task has been submitted. CREATED: its reply has come."""

    SUBMITTED = "submitted"
    CREATED = "created"


@dataclass
class Row:
    """One object.

    Attributes:
        producer: The id of the actor that makes it, None while unknown or if it is no actor.
        transport: The transport that the user named, None while unknown.
        location: Where its tensors are; None while SUBMITTED, or if it has none.
        handle: Keeps the producer alive; None if that is not necessary.
        is_warned: True once the user was warned that the producer shares it.
    """

    state: State
    producer: bytes | None = None
    transport: str | None = None
    location: Location | None = None
    handle: Any = None
    destinations: set[bytes] = field(default_factory=set)
    is_warned: bool = False
    #: Early rows only: submits in flight that may name it.
    _awaited_submits: set[int] = field(default_factory=set)


class ObjectDirectory:
    """The rows of one owner. Not thread-safe: its caller holds a lock."""

    def __init__(self) -> None:
        self._rows: dict[str, Row] = {}
        self._early: set[str] = set()
        self._submits: set[int] = set()
        self._last_submit = 0

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, object_id: str) -> Row | None:
        return self._rows.get(object_id)

    def begin_submit(self) -> int:
        self._last_submit += 1
        self._submits.add(self._last_submit)
        return self._last_submit

    def end_submit(self, submit: int) -> list[Instruction]:
        self._submits.discard(submit)
        if not self._early:
            return []
        orphans = []
        for object_id in self._early:
            awaited = self._rows[object_id]._awaited_submits
            awaited.discard(submit)
            if not awaited:
                orphans.append(object_id)
        return [todo for object_id in orphans for todo in self.out_of_scope(object_id)]

    def submitted(
        self, object_id: str, producer: bytes | None, transport: str, handle: Any = None
    ) -> None:
        row = self._rows.setdefault(object_id, Row(State.SUBMITTED))
        self._early.discard(object_id)
        row.producer, row.transport = producer, transport
        if row.state is State.SUBMITTED or _is_at_producer(row.location):
            row.handle = handle

    def created(self, object_id: str, location: Location | None) -> Sequence[Instruction]:
        row = self._rows.get(object_id)
        if row is None:
            if not self._submits:
                return _free(location)
            row = self._rows[object_id] = Row(State.CREATED)
            row._awaited_submits = set(self._submits)
            self._early.add(object_id)
        old, row.location, row.state = row.location, location, State.CREATED
        release = [] if _is_at_producer(location) else _release_handle(row, is_last=False)
        if old == location:
            return release
        if location is None:
            return [*_free(old), *release]
        hints = (Hint(destination, location) for destination in row.destinations)
        return [*_free(old), Own(object_id, location), *hints, *release]

    def out_of_scope(self, object_id: str) -> list[Instruction]:
        self._early.discard(object_id)
        row = self._rows.pop(object_id, None)
        if row is None:
            return []
        return [*_free(row.location), *_release_handle(row, is_last=True)]

    def passed_to(self, object_id: str, destination: bytes) -> Sequence[Instruction]:
        """Handle an object that is an argument of a task submitted to an actor."""
        row = self._rows.get(object_id)
        if row is None:
            return []
        row.destinations.add(destination)
        hints = [Hint(destination, row.location)] if row.location is not None else []
        is_shared = row.producer in row.destinations and len(row.destinations) > 1
        if not is_shared or row.is_warned:
            return hints
        row.is_warned = True
        return [*hints, WarnShared(object_id)]

    def may_own(self, object_id: str, key: bytes) -> bool:
        """Tell whether an object's copy with this key is in use here, or may be later."""
        row = self._rows.get(object_id)
        if row is None:
            return bool(self._submits)
        if row.state is State.SUBMITTED:
            return True
        return row.location is not None and row.location.key == key

    def find(self, key: bytes) -> str:
        """Return the id of the object whose copy has this key, or "". Searches all rows."""
        rows = self._rows.items()
        found = (name for name, row in rows if row.location and row.location.key == key)
        return next(found, "")

    def close(self) -> list[Instruction]:
        return [todo for object_id in list(self._rows) for todo in self.out_of_scope(object_id)]


def _free(location: Location | None) -> list[Free]:
    return [Free(location)] if location is not None else []


def _is_at_producer(location: Location | None) -> bool:
    """Tell whether an object's tensors are in its producer's process only."""
    return location is not None and not location.is_eager


def _release_handle(row: Row, is_last: bool) -> list[ReleaseHandle]:
    handle, row.handle = row.handle, None
    return [ReleaseHandle(handle, is_last)] if handle is not None else []
