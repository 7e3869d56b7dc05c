"""The failures that RDT's parts report to each other. ``errors.py`` has those that users see."""

from __future__ import annotations

from ray.experimental.rdt.common.interrupts import is_interrupt


class TransferFailed(Exception):
    """A transfer, or a request to another process, failed.

    The code is one word that also travels between processes. It decides two of the fields:
    ``broken`` is retryable, and ``peer_lost`` and ``unreachable`` say that the peer is lost.

    Attributes:
        code: "not_found" for an object that its producer does not hold any more, "changed" for one
            whose memory the user freed or resized, "unavailable" for a transport that cannot serve
            the transfer, a code of the agent's, or "".
        retryable: Only the connection or the link has ended; the same transfer may succeed now.
        may_still_write: A device or a library may still write into the destination.
        peer_lost: The process of the peer is gone.
    """

    #: The code of instances that are given none.
    code = ""

    def __init__(
        self,
        message: str = "",
        code: str = "",
        *,
        retryable: bool = False,
        may_still_write: bool = False,
    ):
        super().__init__(message)
        self.code = code or self.code
        self.retryable = retryable or self.code == "broken"
        self.may_still_write = may_still_write
        self.peer_lost = self.code in ("peer_lost", "unreachable")


class TransferTimedOut(TransferFailed, TimeoutError):
    """The deadline passed before all bytes had arrived."""


def note_still_writing(error: BaseException) -> None:
    """Mark a failed transfer's error: the destination may still be written. The caller raises it.

    An interrupt stays as it is, since it ends the whole fetch.

    Raises:
        TransferFailed: marked, with ``error`` as its cause, where that has no such mark.
    """
    if isinstance(error, TransferFailed):
        error.may_still_write = True
    elif isinstance(error, Exception) and not is_interrupt(error):
        kind = TransferTimedOut if isinstance(error, TimeoutError) else TransferFailed
        raise kind(f"{type(error).__name__}: {error}", may_still_write=True) from error
