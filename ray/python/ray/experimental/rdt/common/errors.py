"""The errors that RDT raises to users, one small tree below ``ray.exceptions.RayError``.

Each names the object, the two processes, the lane, the cause, and what the user can do.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray.exceptions import (
    ActorDiedError,
    ObjectFetchTimedOutError,
    ObjectLostError,
    RayError,
)


@dataclass(frozen=True)
class FetchContext:
    """The pull that failed.

    Attributes:
        object_id: The object's id in hex, "" if the value came without a reference.
        transport: The transport that the producer's user named.
        lane: The selected lane, "" if none was selected yet.
        peer: The producer in words: actor or worker id, host and process.
    """

    object_id: str
    transport: str
    lane: str
    peer: str


class RDTError(RayError):
    """An operation of tensor transport other than a fetch failed."""


class NixlOutOfMemoryError(RDTError, RuntimeError):
    """The pool of ``register_nixl_memory_pool`` has no room, and no fallback is possible."""


class RDTFetchError(ObjectLostError):
    """The tensors of an RDT object could not be fetched from the process that holds them.

    Attributes:
        context: The pull that failed.
        reason: The cause, in one sentence.
        advice: The user's remedy, in one sentence.
    """

    def __init__(self, context: FetchContext, reason: str, advice: str):
        super().__init__(context.object_id, None, "")
        self.context = context
        self.reason = reason
        self.advice = advice

    def __str__(self) -> str:
        where = f"over {self.context.lane}" if self.context.lane else "before a lane was selected"
        return (
            f"RDT object {self.context.object_id or '(no id)'} could not be fetched from "
            f"{self.context.peer} (transport {self.context.transport!r}, {where}): "
            f"{self.reason} {self.advice}"
        )

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return type(self), (self.context, self.reason, self.advice)


class RDTChecksumError(RDTFetchError):
    """The received bytes differ from the producer's. Only with ``RAY_RDT_CHECKSUM=1``."""


class RDTProducerDiedError(RDTFetchError, ActorDiedError):
    """The process that held the tensors is gone. Also caught as ``ActorDiedError``."""

    def __init__(self, context: FetchContext, reason: str, advice: str):
        ActorDiedError.__init__(self)
        RDTFetchError.__init__(self, context, reason, advice)

    __str__ = RDTFetchError.__str__
    __reduce__ = RDTFetchError.__reduce__

    def because(self, why_not: str) -> RDTProducerDiedError:
        """Return the same error with the reason why the object was not reconstructed."""
        advice = f"It was not reconstructed: {why_not}. {self.advice}"
        error = type(self)(self.context, self.reason, advice)
        error.__cause__ = self.__cause__
        return error


class RDTFetchTimedOutError(RDTFetchError, ObjectFetchTimedOutError):
    """The producer did not deliver within ``RAY_rdt_fetch_fail_timeout_milliseconds``."""

    __str__ = RDTFetchError.__str__
