"""The producer's side of a pull over a transport."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.producer.tensor_store import TensorStore
from ray.experimental.rdt.producer.transport_server import Server
from ray.experimental.rdt.rpc.session import CallError
from ray.experimental.rdt.serialization.layout import lay_out
from ray.experimental.rdt.transports.base import Capabilities


class SlowTransport:
    """Exposes nothing before its gate is opened."""

    capabilities = Capabilities("slow", frozenset({"cpu"}), two_sided=False)

    def __init__(self) -> None:
        self.begun, self.gate = threading.Event(), threading.Event()

    def expose(self, buffers: list[torch.Tensor]) -> dict[str, Any]:
        self.begun.set()
        self.gate.wait(20)
        return {"exposed": len(buffers)}


def make_server() -> Any:
    def nothing(*_: Any) -> None: ...

    session: Any = SimpleNamespace(
        serve=nothing, on_peer_lost=nothing, on_tick=nothing, on_close=nothing
    )
    return Server(session, TensorStore(), SimpleNamespace(), SimpleNamespace())  # type: ignore[arg-type]


def test_a_reader_waits_for_anothers_exposure_no_longer_than_it_has_time() -> None:
    server, transport = make_server(), SlowTransport()
    stored: Any = SimpleNamespace(key=b"k" * 16, captured=lay_out([torch.ones(3)]))
    body, answers = {"device": "cpu", "transport": "slow"}, []

    def expose(seconds: float) -> None:
        answers.append(server._expose_once(transport, stored, body, Deadline.after(seconds)))

    first = threading.Thread(target=expose, args=(20,))
    first.start()
    try:
        assert transport.begun.wait(10)
        with pytest.raises(CallError, match="over slow for another reader has not ended"):
            expose(0.05)
    finally:
        transport.gate.set()
        first.join(20)
    expose(5)
    assert answers == [{"exposed": 1}] * 2


def test_a_first_reader_that_runs_out_of_time_fails_no_other() -> None:
    server, transport = make_server(), SlowTransport()
    stored: Any = SimpleNamespace(key=b"k" * 16, captured=lay_out([torch.ones(3)]))
    body, ends = {"device": "cpu", "transport": "slow"}, []
    expose = transport.expose

    def run_out_of_time(buffers: list[torch.Tensor]) -> dict[str, Any]:
        transport.expose = expose  # type: ignore[method-assign]
        expose(buffers)
        raise TimeoutError("the device did not finish")

    def read(seconds: float) -> None:
        try:
            ends.append(server._expose_once(transport, stored, body, Deadline.after(seconds)))
        except TimeoutError as error:
            ends.append(error)

    transport.expose = run_out_of_time  # type: ignore[method-assign]
    readers = [threading.Thread(target=read, args=(seconds,)) for seconds in (0.05, 20)]
    readers[0].start()
    assert transport.begun.wait(10)
    readers[1].start()
    transport.gate.set()
    for reader in readers:
        reader.join(20)
    failure, described = ends
    assert str(failure) == "the device did not finish"
    assert described == {"exposed": 1}
    assert server.exposed == 1


def test_exposures_are_kept_for_what_the_object_has_alone() -> None:
    server, transport = make_server(), SlowTransport()
    transport.gate.set()
    stored: Any = SimpleNamespace(key=b"k" * 16, captured=lay_out([torch.ones(3)]))
    body = {"device": "no such device", "transport": "slow"}
    with pytest.raises(CallError, match="no tensors on 'no such device'"):
        server._expose_once(transport, stored, body, Deadline.after(5))
    assert not server._exposed


def test_a_transport_that_sends_is_not_asked_to_expose() -> None:
    server = make_server()
    sender = SimpleNamespace(capabilities=Capabilities("gloo", frozenset({"cpu"}), two_sided=True))
    server._transports.get = lambda name: sender
    body = {"device": "cpu", "transport": "gloo", "key": b"k" * 16, "timeout_s": 5.0}
    with pytest.raises(CallError, match="exposes nothing"):
        server._on_expose(b"peer", body)
    assert not server._exposed
