"""Exceptions of signal handlers are told from others, however the handler is written."""

from __future__ import annotations

import functools
import gc
import signal
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from ray.experimental.rdt.common.failures import is_interrupt, raise_if_interrupt


def fail(*arguments: Any) -> None:
    raise TimeoutError("of the program's own")


def plain(signum: int, frame: Any) -> None:
    fail()


def deleting(signum: int, frame: Any) -> None:
    del signum, frame
    fail()


class Handler:
    def method(self, signum: int, frame: Any) -> None:
        raise TimeoutError

    def deleting(self, *arguments: Any) -> None:
        del arguments
        raise TimeoutError

    def __call__(self, signum: int, frame: Any) -> None:
        raise TimeoutError


HANDLERS = [
    plain,
    fail,
    lambda *arguments: fail(),
    lambda signum, frame: fail(signum),
    deleting,
    Handler().method,
    Handler().deleting,
    Handler(),
    functools.partial(fail, "more"),
]


def caught_of(action: Callable[[], None]) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("it raises")


@pytest.mark.parametrize("handler", HANDLERS)
def test_what_a_handler_raises_is_raised_again(handler: Any) -> None:
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        error = caught_of(lambda: signal.raise_signal(signal.SIGUSR1))
        assert is_interrupt(error)
        with pytest.raises(TimeoutError) as caught:
            raise_if_interrupt(error)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caught.value is error


def test_what_others_raise_is_left_alone() -> None:
    error = caught_of(lambda: fail(1, 2))
    assert not is_interrupt(error)
    raise_if_interrupt(error)
    assert not is_interrupt(TimeoutError())


def test_an_error_that_was_looked_at_dies_where_it_was_handled() -> None:
    class Held:
        pass

    def look(held: Held) -> None:
        try:
            fail(held)
        except TimeoutError as error:
            raise_if_interrupt(error)

    held = Held()
    left = weakref.ref(held)
    gc.disable()
    try:
        look(held)
        del held
        assert left() is None
    finally:
        gc.enable()
