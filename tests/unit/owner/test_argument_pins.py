"""The RDT arguments of normal tasks stay alive until the tasks have ended."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import ray
from ray.experimental.rdt.common import deadline
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.owner.argument_pins import ArgumentPins
from tests.support import wait_until
from tests.unit.fakes import Clock


class Tasks:
    """A fake of ``ray.wait``: tasks end at the test's command."""

    def __init__(self) -> None:
        self.ended: set[str] = set()
        self.error: Exception | None = None
        self.changed = threading.Condition()

    def wait(self, tasks: list[str], **options: Any) -> tuple[list[str], list[str]]:
        with self.changed:
            self.changed.wait_for(
                lambda: self.error or self.ended.intersection(tasks), options["timeout"]
            )
            if self.error is not None:
                raise self.error
            ended = [task for task in tasks if task in self.ended]
            return ended, [task for task in tasks if task not in ended]

    def end(self, task: str) -> None:
        with self.changed:
            self.ended.add(task)
            self.changed.notify_all()

    def fail(self, error: Exception) -> None:
        with self.changed:
            self.error = error
            self.changed.notify_all()


class Argument:
    pass


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Tasks:
    tasks = Tasks()
    monkeypatch.setattr(ray, "wait", tasks.wait)
    return tasks


@pytest.fixture
def pins(tasks: Tasks) -> Iterator[ArgumentPins]:
    pins = ArgumentPins()
    yield pins
    pins.clear()


def test_arguments_live_until_their_task_has_ended(pins: ArgumentPins, tasks: Tasks) -> None:
    first, second = Argument(), Argument()
    is_first, is_second = weakref.ref(first), weakref.ref(second)
    pins.hold([first], ["first task"])
    pins.hold([second], ["second task"])
    del first, second
    tasks.end("first task")
    wait_until(lambda: is_first() is None, "the first is dropped")
    assert is_second() is not None
    assert len(pins) == 1
    tasks.end("second task")
    wait_until(lambda: is_second() is None, "the second is dropped")
    assert len(pins) == 0


def test_a_task_has_ended_when_its_last_return_is_there(pins: ArgumentPins, tasks: Tasks) -> None:
    argument = Argument()
    is_alive = weakref.ref(argument)
    pins.hold([argument], ["first return", "last return"])
    pins.hold([Argument()], ["another task"])
    del argument
    tasks.end("first return")
    tasks.end("another task")
    wait_until(lambda: len(pins) == 1, "the other task's argument is dropped")
    assert is_alive() is not None
    tasks.end("last return")
    wait_until(lambda: is_alive() is None, "the argument is dropped")


def test_without_returns_arguments_live_as_long_as_a_fetch_may_take(
    pins: ArgumentPins, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.install(monkeypatch, deadline)
    argument = Argument()
    is_alive = weakref.ref(argument)
    pins.hold([argument], [])
    del argument
    clock.sleep(settings().fetch_timeout_s - 1)
    pins.hold([], ["a task"])
    assert is_alive() is not None
    clock.sleep(2)
    wait_until(lambda: is_alive() is None, "the argument is dropped")


def test_clear_drops_everything(pins: ArgumentPins) -> None:
    pins.hold([Argument()], ["a task"])
    pins.hold([Argument()], [])
    pins.clear()
    assert len(pins) == 0


def test_arguments_are_held_again_after_clear(pins: ArgumentPins, tasks: Tasks) -> None:
    pins.hold([Argument()], ["a task"])
    pins.clear()
    pins.hold([Argument()], ["another task"])
    tasks.end("another task")
    wait_until(lambda: len(pins) == 0, "the argument is dropped")


def test_everything_is_dropped_when_ray_shuts_down(pins: ArgumentPins, tasks: Tasks) -> None:
    pins.hold([Argument()], ["a task"])
    tasks.fail(RuntimeError("Ray is shut down"))
    wait_until(lambda: len(pins) == 0, "the argument is dropped")
