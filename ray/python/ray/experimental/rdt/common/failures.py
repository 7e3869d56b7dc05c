"""The failures that RDT's parts report to each other. ``errors.py`` has those that users see."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any


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


def raise_if_interrupt(error: BaseException) -> None:
    """Raise an exception again if a signal handler of the program raised it.

    Runs on: any thread, in an ``except`` clause that would handle the error.
    """
    if is_interrupt(error):
        raise error


def is_interrupt(error: BaseException) -> bool:
    """Tell whether a signal handler of the program raised an exception.

    Python runs a signal handler on the main thread between two instructions, so RDT's code may
    raise the handler's exception. A handler receives the interrupted frame as an argument. No other
    function below RDT's code receives a frame that called it. A handler that deletes its arguments
    is recognized as long as it is installed.
    """
    handlers, outer = _handlers(), list[FrameType]()
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code in handlers:
            return True
        # The first frame handles the error. Reading its locals would keep the error alive.
        if outer and any(argument is each for argument in _arguments(frame) for each in outer):
            return True
        outer.append(frame)
        traceback = traceback.tb_next
    return False


def _handlers() -> set[CodeType]:
    """Return the code of the installed handlers."""
    handlers = map(signal.getsignal, signal.valid_signals())
    return {code for each in handlers if (code := getattr(each, "__code__", None)) is not None}


def _arguments(frame: FrameType) -> Iterator[Any]:
    code = frame.f_code
    for name in code.co_varnames[: code.co_argcount]:
        yield frame.f_locals.get(name)
    if code.co_flags & inspect.CO_VARARGS:
        star = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
        yield from frame.f_locals.get(star) or ()
