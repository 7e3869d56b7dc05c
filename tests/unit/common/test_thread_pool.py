"""Threads that take actions in turn, and are daemons."""

from __future__ import annotations

import logging
import threading

import pytest

from ray.experimental.rdt.common.thread_pool import DaemonThreads
from tests.support import wait_until


def test_as_many_run_at_once_as_there_are_threads() -> None:
    threads, gate, running, done = DaemonThreads(3, "some"), threading.Event(), [], []

    def act(number: int) -> None:
        running.append(threading.current_thread())
        assert gate.wait(20)
        done.append(number)

    for number in range(5):
        threads.submit(act, number)
    wait_until(lambda: len(running) == 3, "three run")
    gate.set()
    wait_until(lambda: sorted(done) == [0, 1, 2, 3, 4], "all have run")
    assert {thread.name for thread in running} == {"some_0", "some_1", "some_2"}
    assert all(thread.daemon for thread in running)
    threads.close()
    for thread in running:
        thread.join(20)
        assert not thread.is_alive()


def test_an_idle_thread_is_taken_before_a_new_one_begins() -> None:
    threads, names = DaemonThreads(3, "some"), []
    for count in range(1, 6):
        threads.submit(lambda: names.append(threading.current_thread().name))
        wait_until(lambda count=count: len(names) == count, "it has run")
        wait_until(lambda: threads._idle._value == 1, "its thread waits")
    assert set(names) == {"some_0"}
    threads.close()


def test_what_is_raised_is_logged_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    threads, done = DaemonThreads(1, "some"), threading.Event()
    logging.getLogger("ray.rdt").addHandler(caplog.handler)
    try:
        threads.submit(lambda: 1 / 0)
        threads.submit(done.set)
        assert done.wait(20)
    finally:
        logging.getLogger("ray.rdt").removeHandler(caplog.handler)
    assert "division by zero" in caplog.text
    threads.close()


def test_closed_threads_drop_what_waits_and_take_no_more() -> None:
    threads, gate, begun, ran = DaemonThreads(1, "some"), threading.Event(), threading.Event(), []

    def act() -> None:
        begun.set()
        assert gate.wait(20)
        ran.append(1)

    threads.submit(act)
    threads.submit(ran.append, 2)
    assert begun.wait(20)
    threads.close()
    with pytest.raises(RuntimeError, match="some have been closed"):
        threads.submit(ran.append, 3)
    gate.set()
    wait_until(lambda: ran == [1], "what had begun ends")
