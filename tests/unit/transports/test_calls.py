"""Calls of code that may hang, on threads of their own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.calls import call
from tests.support import wait_until


class Memory:
    """Something that the caller or the call uses."""


@pytest.fixture
def _without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_collector")
def test_a_failed_call_keeps_nothing_of_its_caller() -> None:
    def fail() -> None:
        raise ValueError("no")

    def use(memory: Memory) -> None:
        with pytest.raises(ValueError, match="no"):
            call("method", fail, Deadline.after(20))

    memory = Memory()
    kept = weakref.ref(memory)
    use(memory)
    del memory
    wait_until(lambda: kept() is None, "the caller's memory is freed without the collector")
