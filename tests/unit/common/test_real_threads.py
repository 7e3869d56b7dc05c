"""Threads and locks of the system: as Python's, and no others are used."""

from __future__ import annotations

import ast
import concurrent.futures
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import ray.experimental.rdt
from ray.experimental.rdt.common import real_threads
from tests.support import wait_until

PACKAGE = Path(ray.experimental.rdt.__file__).parent

#: What only ``real_threads`` takes from Python, by module; [] stands for all of it.
FORBIDDEN: dict[str, list[str]] = {
    "queue": [],
    "_thread": [],
    "select": ["epoll", "poll", "select"],
    "threading": [],
    "time": ["sleep"],
    "concurrent.futures": ["Future", "wait", "ThreadPoolExecutor"],
}

#: Modules that may: the first asks what thread it is on, the last runs in actors of a test.
EXCEPTIONS = {
    "common/thread_role.py",
    "common/real_threads.py",
    "transports/conformance/actions.py",
}


def test_condition_wakes_all_who_wait_and_can_be_entered_again() -> None:
    changed, woken, values = real_threads.Condition(), [], []

    def wait() -> None:
        with changed, changed:
            woken.append(changed.wait_for(lambda: values, timeout=20))

    threads = [real_threads.Thread(wait, name="waits") for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(changed._waiters) == 3, "all wait")
    with changed:
        values.append(1)
        changed.notify_all()
    for thread in threads:
        thread.join(20)
    assert woken == [[1]] * 3


def test_who_waits_is_woken_after_an_interrupted_notify() -> None:
    """An exception in the middle, as of a signal handler; the program tries again."""
    changed, woken = real_threads.Condition(), []

    def wait() -> None:
        with changed:
            woken.append(changed.wait(20))

    def interrupt(_: Any, event: str, function: Any) -> None:
        if event == "c_return" and function.__name__ in ("popleft", "release"):
            sys.setprofile(None)
            raise KeyboardInterrupt

    threads = [real_threads.Thread(wait, name="waits") for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(changed._waiters) == 2, "both wait")
    with changed:
        sys.setprofile(interrupt)
        with pytest.raises(KeyboardInterrupt):
            changed.notify_all()
        changed.notify_all()
    for thread in threads:
        thread.join(25)
    assert woken == [True, True]


def test_waits_end_in_time() -> None:
    changed, event, began = real_threads.Condition(), real_threads.Event(), time.monotonic()
    with changed:
        assert not changed.wait(0.05)
        assert not changed.wait_for(lambda: False, 0.05)
    assert not event.wait(0.05)
    assert not event.wait(-1)
    assert 0.15 <= time.monotonic() - began < 10
    assert not changed._waiters
    event.set()
    assert event.is_set()
    assert event.wait(1e12)


def test_semaphore_lets_so_many_in() -> None:
    semaphore = real_threads.Semaphore(2)
    with semaphore, semaphore:
        assert not semaphore.acquire(blocking=False)
    assert semaphore.acquire(blocking=False)


def test_future_is_one_of_pythons() -> None:
    future: real_threads.Future[int] = real_threads.Future()
    thread = real_threads.Thread(future.set_result, (7,), "sets")
    thread.start()
    assert future.result(20) == 7
    assert isinstance(future, concurrent.futures.Future)
    with pytest.raises(concurrent.futures.TimeoutError):
        real_threads.Future().result(0.01)


def test_threads_are_daemons_that_python_knows() -> None:
    found: list[threading.Thread] = []
    thread = real_threads.Thread(lambda: found.append(threading.current_thread()), name="mine")
    assert not thread.is_current()
    thread.start()
    thread.join(20)
    assert found[0].name == "mine"
    assert found[0].daemon


#: A program that is patched before it imports anything else.
PATCHED_FIRST = """
from gevent import monkey; monkey.patch_all()
import threading, time
from pathlib import Path
from ray.experimental.rdt.common import real_threads
found, event = [], real_threads.Event()
def run():
    found.append((threading.get_native_id(), Path("/proc/thread-self/comm").read_text().strip()))
    real_threads.sleep(0.01)
    event.set()
thread = real_threads.Thread(run, name="rdt-of-system")
thread.start()
assert event.wait(20)
thread.join(20)
assert found[0][0] != threading.get_native_id()
assert found[0][1] == "rdt-of-system"
print("real")
"""


def test_patched_before_everything_else() -> None:
    pytest.importorskip("gevent", reason="gevent is not installed")
    program = [sys.executable, "-c", PATCHED_FIRST]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "real\n", done.stderr


def test_no_other_threads_are_used() -> None:
    found = [
        f"{file.relative_to(PACKAGE)} takes {name}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if str(file.relative_to(PACKAGE)) not in EXCEPTIONS
        for name in taken(ast.parse(file.read_text()))
    ]
    assert not found


def taken(tree: ast.Module) -> list[str]:
    """Return the forbidden names that a module uses."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [each.name for each in node.names if FORBIDDEN.get(each.name) == []]
        if isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN:
            wanted = FORBIDDEN[node.module]
            found += [each.name for each in node.names if not wanted or each.name in wanted]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            name = node.value.id
            found += [f"{name}.{node.attr}"] if node.attr in FORBIDDEN.get(name, []) else []
    return found
