"""Transports that the user did not name: for which pairs of processes they are tried."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ray.experimental.rdt.common import deadline
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.consumer.planner import TransferObject, plan_transfer
from ray.experimental.rdt.transports import selection
from ray.experimental.rdt.transports.nixl.engine import has_rdma


def address(agent: bytes, boot: bytes) -> bytes:
    return b"RDT!\x01\x00" + agent * 16 + boot * 16 + bytes(20)


HERE = address(b"a", b"1")
NEAR = address(b"b", b"1")
FAR = address(b"c", b"2")


@pytest.fixture
def policy(monkeypatch: pytest.MonkeyPatch) -> Any:
    lost: list[Any] = []
    session: Any = SimpleNamespace(address=HERE, on_peer_lost=lost.append)
    monkeypatch.setattr(selection, "_has_rdma", lambda: True)
    made = selection.AutoTransportPolicy(session)

    def reason(name: str, producer: bytes) -> str:
        """Why a transport that the user did not name is not tried."""
        obj = TransferObject(default_transports=[name])
        (found,) = [c for c in plan_transfer(obj, made.pair(producer)) if c.name == name]
        return "" if found.serves else found.reason

    return SimpleNamespace(failed=made.failed, reason=reason, lose=lost[0])


@pytest.mark.parametrize(
    ("name", "producer", "why"),
    [
        ("nixl", FAR, ""),
        ("nixl", NEAR, "on one host"),
        ("nccl", FAR, ""),
        ("nccl", NEAR, ""),
        ("cuda_ipc", NEAR, ""),
        ("cuda_ipc", FAR, "another host"),
        ("another_ipc", FAR, ""),
    ],
)
def test_what_rules_a_transport_out(policy: Any, name: str, producer: bytes, why: str) -> None:
    reason = policy.reason(name, producer)
    assert why in reason
    assert bool(why) == bool(reason)


def test_nixl_is_not_taken_where_there_is_no_rdma(
    policy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(selection, "_has_rdma", lambda: has_rdma(tmp_path))
    assert "no RDMA device" in policy.reason("nixl", FAR)
    (tmp_path / "infiniband/mlx5_0").mkdir(parents=True)
    assert policy.reason("nixl", FAR) == ""


def test_the_setting_forbids(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only_tcp = replace(settings(), lanes=frozenset({"tcp"}))
    monkeypatch.setattr(selection, "settings", lambda: only_tcp)
    for name in ("nixl", "nccl", "cuda_ipc"):
        assert "RAY_RDT_LANES" in policy.reason(name, NEAR)
    assert policy.reason("another_ipc", NEAR) == ""


def test_what_failed_is_left_alone_for_a_while(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(deadline.time, "monotonic", lambda: clock.now)
    policy.failed("nixl", FAR, RuntimeError("the cable is out"))
    policy.failed("cuda_ipc", NEAR, RuntimeError("an expandable segment"))
    assert "RuntimeError: the cable is out" in policy.reason("nixl", FAR)
    assert policy.reason("nccl", FAR) == ""
    assert policy.reason("nixl", address(b"d", b"2")) == ""
    assert policy.reason("cuda_ipc", NEAR) == ""
    clock.now += 61
    assert policy.reason("nixl", FAR) == ""


def test_a_lost_peer_is_forgotten(policy: Any) -> None:
    policy.failed("nccl", FAR, RuntimeError("it hangs"))
    policy.failed("nccl", NEAR, RuntimeError("it hangs"))
    policy.lose(b"c" * 16)
    assert policy.reason("nccl", FAR) == ""
    assert policy.reason("nccl", NEAR)
