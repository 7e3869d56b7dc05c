"""The knowledge of a process's nixl agent about other agents."""

from __future__ import annotations

import pickle
import threading
import time

import pytest

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.nixl import endpoint as nixl_endpoint
from ray.experimental.rdt.transports.nixl.endpoint import Remotes
from ray.experimental.rdt.transports.nixl.engine import NixlError
from tests.unit.transports.nixl.nixl_fakes import Fabric


@pytest.fixture
def engine():
    return Fabric().engine()


@pytest.fixture
def remotes(engine):
    return Remotes(engine)


def exposure(agent="peer", number=1, version=0):
    blob = pickle.dumps((agent, "DRAM", []))
    return {"agent": agent, "number": number, "version": version, "metadata": [blob]}


def soon():
    return Deadline.after(10)


def read(remotes, *args, **kwargs):
    with remotes.reading(exposure(*args, **kwargs), soon()):
        pass


def test_an_exposure_is_learnt_once(engine, remotes):
    for number in (1, 2, 1, 2):
        read(remotes, number=number)
    assert engine.log == [("attach", "peer")] * 2


def test_a_newer_version_makes_a_peer_be_met_anew(engine, remotes):
    read(remotes, number=1, version=1)
    read(remotes, number=2, version=2)
    read(remotes, number=1, version=1)
    read(remotes, number=3)
    attach, detach = ("attach", "peer"), ("detach", "peer")
    assert engine.log == [attach, detach, attach, attach, attach]


def test_a_peer_is_not_forgotten_under_a_read(engine, remotes):
    order = []
    with remotes.reading(exposure(version=1), soon()):
        waiter = threading.Thread(
            target=lambda: (read(remotes, number=2, version=2), order.append("second"))
        )
        waiter.start()
        time.sleep(0.05)
        assert ("detach", "peer") not in engine.log
        order.append("first")
    waiter.join(10)
    assert order == ["first", "second"]
    assert ("detach", "peer") in engine.log


def test_waiting_for_other_reads_ends_at_the_deadline(remotes):
    with remotes.reading(exposure(version=1), soon()):
        late = remotes.reading(exposure(number=2, version=2), Deadline.after(0.01))
        with pytest.raises(TimeoutError), late:
            pass
    read(remotes, number=2, version=2)


def test_a_broken_connection_is_made_anew(engine, remotes):
    with pytest.raises(NixlError), remotes.reading(exposure(), soon()):
        raise NixlError("broken")
    read(remotes)
    assert engine.log == [("attach", "peer"), ("detach", "peer"), ("attach", "peer")]


def test_memory_that_cannot_be_reached_is_unavailable(engine, remotes):
    engine.refusal = NixlError("no common backend")
    with pytest.raises(TransportUnavailable, match="no common backend"):
        read(remotes)
    engine.refusal = None
    read(remotes)


def test_a_peer_with_many_exposures_is_met_anew(engine, remotes, monkeypatch):
    monkeypatch.setattr(nixl_endpoint, "_MAX_EXPOSURES", 3)
    for number in range(4):
        read(remotes, number=number)
    assert engine.log.count(("detach", "peer")) == 1


def test_of_many_peers_the_longest_unused_is_forgotten(engine, remotes, monkeypatch):
    monkeypatch.setattr(nixl_endpoint, "_MAX_PEERS", 2)
    for agent in ("a", "b", "a", "c"):
        read(remotes, agent)
    assert [entry for entry in engine.log if entry[0] == "detach"] == [("detach", "b")]
