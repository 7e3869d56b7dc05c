"""Distinguishes exceptions of the program's signal handlers from errors of RDT.

Python runs a signal handler on the main thread between two instructions, so RDT's code may raise
the handler's exception. A handler receives the interrupted frame as an argument. No other function
below RDT's code receives a frame that called it. A handler that deletes its arguments is recognized
as long as it is installed.
"""

from __future__ import annotations

import inspect
import signal
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any


def raise_if_interrupt(error: BaseException) -> None:
    """Raise an exception again if a signal handler of the program raised it.

    Runs on: any thread, in an ``except`` clause that would handle the error.
    """
    if is_interrupt(error):
        raise error


def is_interrupt(error: BaseException) -> bool:
    """Tell whether a signal handler of the program raised an exception."""
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
