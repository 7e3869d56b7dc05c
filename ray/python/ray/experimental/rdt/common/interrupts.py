"""Tells exceptions of the program's signal handlers from errors of RDT.

Python runs a signal handler on the main thread, in the middle of whatever that thread does, so its
exception comes out of RDT's code. A handler is called with the frame that it interrupts; no other
function on RDT's way gets one of the frames that called it. A handler that has deleted its
arguments is known if it is still set.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any


def raise_if_interrupt(error: BaseException) -> None:
    """Raises an exception again, as it is, if a signal handler of the program's raised it.

    Runs on: any thread, in an ``except`` clause that would handle the error.
    """
    if is_interrupt(error):
        raise error


def is_interrupt(error: BaseException) -> bool:
    """Whether a signal handler of the program's raised an exception."""
    handlers, outer = _handlers(), list[FrameType]()
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code in handlers:
            return True
        # Not of the first frame, which handles the error: to read its locals would keep the error.
        if outer and any(argument is each for argument in _arguments(frame) for each in outer):
            return True
        outer.append(frame)
        traceback = traceback.tb_next
    return False


def _handlers() -> set[CodeType]:
    """Of the functions and methods that now are handlers."""
    handlers = map(signal.getsignal, signal.valid_signals())
    return {code for each in handlers if (code := getattr(each, "__code__", None)) is not None}


def _arguments(frame: FrameType) -> Iterator[Any]:
    code = frame.f_code
    for name in code.co_varnames[: code.co_argcount]:
        yield frame.f_locals.get(name)
    if code.co_flags & inspect.CO_VARARGS:
        star = code.co_varnames[code.co_argcount + code.co_kwonlyargcount]
        yield from frame.f_locals.get(star) or ()
