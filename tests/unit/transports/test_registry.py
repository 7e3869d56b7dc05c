"""The transports of one session by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ray.experimental.rdt.transports import registry
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.registry import Transports


@pytest.fixture
def transports(monkeypatch: pytest.MonkeyPatch) -> Transports:
    monkeypatch.setattr(registry.registered, "find", lambda name: None)
    session: Any = SimpleNamespace()
    return Transports(session)


def test_names_that_no_transport_has_are_not_kept(transports: Transports) -> None:
    for number in range(3):
        with pytest.raises(TransportUnavailable, match="is not known here"):
            transports.get(f"unknown {number}")
    assert not transports._made


def test_a_transport_that_cannot_be_made_is_tried_again(
    transports: Transports, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def make(session: Any) -> Any:
        made.append(session)
        if len(made) == 1:
            raise TransportUnavailable("not yet")
        return made

    module = SimpleNamespace(Make=make)
    monkeypatch.setattr(registry.importlib, "import_module", lambda name: module)
    monkeypatch.setitem(registry._FACTORIES, "gloo", ("module", "Make"))
    with pytest.raises(TransportUnavailable, match="not yet"):
        transports.get("gloo")
    assert transports.get("gloo") is made
    assert transports.get("gloo") is made
    assert len(made) == 2
