"""The explanation is the plan of the fetch, with what both sides said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.consumer.planner import TransferObject, plan_transfer
from ray.experimental.rdt.observe.explainer import Explainer, Question
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.selection import Pair, default_transports

HERE, THERE = b"RDT!\x01\x00" + b"a" * 52, b"RDT!\x01\x00" + b"b" * 52


class AgentError(Exception):
    code = "not_found"


class World:
    """A consumer whose agent reaches every producer over tcp only."""

    def __init__(self, pair: Pair, missing: dict[str, str], monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("ray.experimental.rdt._agent.AgentError", AgentError)
        self.asked: list[str] = []
        self.missing = missing
        reasons = {"map": "another host", "cma": "another host", "shm": "another host", "tcp": "ok"}
        agent = SimpleNamespace(
            agent_id=HERE[6:22],
            pull=lambda *_: SimpleNamespace(wait=self._not_found),
            explain=lambda address: reasons,
        )
        session: Any = SimpleNamespace(address=HERE, agent=agent, serve=lambda *_: None)
        transports: Any = SimpleNamespace(usable=self._usable)
        policy: Any = SimpleNamespace(pair=lambda address: pair)
        self.pair = pair
        self.explainer = Explainer(session, transports, policy)

    def _not_found(self, timeout_s: float) -> None:
        raise AgentError

    def _usable(self, name: str, device_type: str) -> None:
        self.asked.append(name)
        if name in self.missing:
            raise TransportUnavailable(self.missing[name])

    def explain(self, transport: str, offers: dict[str, str], **details: Any) -> Any:
        obj = TransferObject(transport, nbytes=9, **details)
        question = Question("it", THERE, {"cpu": offers}, obj)
        return self.explainer.explain(question, Deadline.after(5))


FAR = Pair(is_same_host=False, has_rdma=True)


@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize("pair", [Pair(), FAR, FAR._replace(is_strict=True)], ids=str)
def test_explanation_follows_the_plan_of_the_fetch(
    monkeypatch: pytest.MonkeyPatch, transport: str, pair: Pair
):
    told = World(pair, {}, monkeypatch).explain(transport, {})
    obj = TransferObject(transport, default_transports=default_transports("cpu"), nbytes=9)
    used = next(candidate for candidate in plan_transfer(obj, pair) if candidate.serves)
    assert told.used() == ("tcp" if used.name == "agent" else used.name)


def test_both_sides_are_asked_about_what_the_rules_allow(monkeypatch: pytest.MonkeyPatch):
    world = World(Pair(), {}, monkeypatch)
    assert world.explain("auto", {"nixl": "no library"}).used() == "tcp"
    assert world.asked == []
    world = World(FAR, {"nixl": "no library"}, monkeypatch)
    reasons = {way.name: way.reason for way in world.explain("auto", {}).ways["cpu"]}
    assert reasons["nixl"] == "at the consumer: no library"
    world = World(FAR, {}, monkeypatch)
    reasons = {way.name: way.reason for way in world.explain("auto", {"nixl": "off"}).ways["cpu"]}
    assert reasons["nixl"] == "at the producer: off"


def test_every_transport_is_named_with_a_reason(monkeypatch: pytest.MonkeyPatch):
    ways = World(FAR, {}, monkeypatch).explain("gloo", {}).ways["cpu"]
    names = [way.name for way in ways]
    assert names[:7] == ["inproc", "eager", "gloo", "cma", "map", "shm", "tcp"]
    assert {*names[7:]} == {"nccl", "nixl", "cuda_ipc", "object store"}
    assert all(way.reason for way in ways)


def test_foreign_data_moves_by_the_users_transport_only(monkeypatch: pytest.MonkeyPatch):
    world = World(FAR, {"shm": "gone"}, monkeypatch)
    told = world.explain("shm", {}, is_user_defined=True, is_foreign=True)
    assert told.used() is None
    assert "moves torch tensors only" in str(told)
