"""A value that the first caller makes while other callers wait."""

from __future__ import annotations

import threading

import pytest

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.once import Once, StillBeingMade


class Caller:
    """A thread that asks for a value; ``make`` waits for its gate."""

    def __init__(self, once, deadline=None, error=None, value=None):
        self.has_begun, self.gate = threading.Event(), threading.Event()
        self.result = self.error = None
        self._once, self._deadline, self._error, self._value = once, deadline, error, value
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _make(self):
        self.has_begun.set()
        assert self.gate.wait(20)
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self):
        try:
            self.result = self._once.get(self._make, self._deadline)
        except Exception as error:
            self.error = error

    def join(self):
        self._thread.join(20)
        assert not self._thread.is_alive(), "a caller hangs"
        return self

    def is_waiting(self):
        return self._thread.is_alive() and not self.has_begun.is_set()


def test_value_is_made_once_and_given_to_all():
    once = Once()
    assert once.peek() is None
    first = Caller(once, value="a")
    assert first.has_begun.wait(20)
    others = [Caller(once, value="b") for _ in range(4)]
    assert once.peek() is None
    first.gate.set()
    assert [caller.join().result for caller in (first, *others)] == ["a"] * 5
    assert not any(caller.has_begun.is_set() for caller in others)
    assert once.peek() == "a"


def test_failure_is_its_callers_own_and_a_waiter_makes_the_next_attempt():
    once = Once()
    first = Caller(once, error=ValueError("no"))
    assert first.has_begun.wait(20)
    second = Caller(once, value="b")
    assert second.is_waiting()
    first.gate.set()
    second.gate.set()
    assert str(first.join().error) == "no"
    assert second.join().result == "b"


def test_failure_lets_the_next_caller_try():
    once = Once()
    with pytest.raises(ZeroDivisionError):
        once.get(lambda: 1 // 0)
    assert once.peek() is None
    assert once.get(lambda: 1) == 1


def test_waiter_has_its_own_deadline_and_the_others_go_on():
    once = Once()
    first = Caller(once, value="a")
    assert first.has_begun.wait(20)
    patient = Caller(once, Deadline.after(20))
    hurried = Caller(once, Deadline.after(0))
    assert isinstance(hurried.join().error, StillBeingMade)
    first.gate.set()
    assert first.join().result == patient.join().result == "a"


def test_first_caller_with_a_short_deadline_fails_nobody_else():
    once = Once()
    first = Caller(once, Deadline.after(0), error=TimeoutError("the device did not finish"))
    assert first.has_begun.wait(20)
    patient = Caller(once, Deadline.after(20), value="b")
    first.gate.set()
    patient.gate.set()
    assert isinstance(first.join().error, TimeoutError)
    assert patient.join().result == "b"


def test_value_that_is_made_needs_no_time():
    once = Once()
    once.get(lambda: 0)
    assert once.get(lambda: 1, Deadline.after(-1)) == 0
    assert once.peek() == 0
