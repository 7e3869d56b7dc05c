"""Requests between two real sessions of this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from ray.experimental.rdt.common.thread_pool import DaemonThreads
from ray.experimental.rdt.rpc.session import CallError, Reply, Session
from tests.support import wait_until


@pytest.fixture
def sessions() -> Iterator[tuple[Session, Session]]:
    secret = os.urandom(32)
    made = Session(secret, "127.0.0.1"), Session(secret, "127.0.0.1")
    yield made
    for session in made:
        session.close()


def test_a_handler_knows_that_its_asker_is_lost(sessions: tuple[Session, Session]) -> None:
    asked, asker = sessions
    lost, arrived, seen = threading.Event(), threading.Event(), []

    def handle(_: bytes, body: dict) -> dict:
        arrived.set()
        if body["waits"]:
            assert lost.wait(20)
        seen.append(asked.is_asker_lost())
        return {}

    asked.on_peer_lost(lambda peer: lost.set())
    asked.serve("look", handle)
    asker.call(asked.address, "look", {"waits": False}, 20)
    assert seen == [False]
    arrived.clear()
    asker.send_oneway(asked.address, "look", {"waits": True})
    assert arrived.wait(20)
    asker.close()
    wait_until(lambda: seen == [False, True], "the handler ends")


def test_a_request_with_threads_of_its_own_goes_on_after_its_answer(
    sessions: tuple[Session, Session],
) -> None:
    asked, asker = sessions
    gate, names = threading.Event(), []

    def note() -> None:
        assert gate.wait(20)
        names.append(threading.current_thread().name)

    def handle(_: bytes, body: dict) -> Reply:
        names.append(threading.current_thread().name)
        return Reply({"n": body["n"] + 1}, note)

    threads = DaemonThreads(1, "own")
    asked.serve("count", handle, threads)
    assert asker.call(asked.address, "count", {"n": 1}, 20) == {"n": 2}
    assert names == ["own_0"]
    gate.set()
    wait_until(lambda: names == ["own_0", "own_0"], "it goes on, on the same thread")
    threads.close()


@pytest.mark.parametrize(
    "payload", [b"", b"look", b"no such\0", b"look\0", b"look\0" + b"\x91" * 9999, b"\0\x80"]
)
def test_whatever_is_asked_is_answered(sessions: tuple[Session, Session], payload: bytes) -> None:
    asked, asker = sessions
    asked.serve("look", lambda _, body: {})
    assert b"error" in asker.agent.call(asked.address, payload).wait(20)
    with pytest.raises(CallError, match="does not serve 'nothing'"):
        asker.call(asked.address, "nothing", {}, 20)
