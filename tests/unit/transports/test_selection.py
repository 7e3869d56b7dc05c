"""Which transports may be taken for a pair although nobody named them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ray.experimental.rdt.common import deadline
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.transports import selection as ways
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
    monkeypatch.setattr(ways, "_has_rdma", lambda: True)
    made = ways.AutoTransportPolicy(session)
    return SimpleNamespace(judge=made, lose=lost[0])


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
    unavailable_reason = policy.judge.unavailable_reason(name, producer)
    assert why in unavailable_reason
    assert bool(why) == bool(unavailable_reason)


def test_nixl_is_not_taken_where_there_is_no_rdma(
    policy: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(ways, "_has_rdma", lambda: has_rdma(tmp_path))
    assert "no RDMA device" in policy.judge.unavailable_reason("nixl", FAR)
    (tmp_path / "infiniband/mlx5_0").mkdir(parents=True)
    assert policy.judge.unavailable_reason("nixl", FAR) == ""


def test_the_setting_forbids(policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only_tcp = replace(settings(), lanes=frozenset({"tcp"}))
    monkeypatch.setattr(ways, "settings", lambda: only_tcp)
    for name in ("nixl", "nccl", "cuda_ipc"):
        assert "RAY_RDT_LANES" in policy.judge.unavailable_reason(name, NEAR)
    assert policy.judge.unavailable_reason("another_ipc", NEAR) == ""


def test_what_failed_is_left_alone_for_a_while(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(deadline.time, "monotonic", lambda: clock.now)
    policy.judge.failed("nixl", FAR, RuntimeError("the cable is out"))
    policy.judge.failed("cuda_ipc", NEAR, RuntimeError("an expandable segment"))
    assert "RuntimeError: the cable is out" in policy.judge.unavailable_reason("nixl", FAR)
    assert policy.judge.unavailable_reason("nccl", FAR) == ""
    assert policy.judge.unavailable_reason("nixl", address(b"d", b"2")) == ""
    assert policy.judge.unavailable_reason("cuda_ipc", NEAR) == ""
    clock.now += 61
    assert policy.judge.unavailable_reason("nixl", FAR) == ""


def test_a_lost_peer_is_forgotten(policy: Any) -> None:
    policy.judge.failed("nccl", FAR, RuntimeError("it hangs"))
    policy.judge.failed("nccl", NEAR, RuntimeError("it hangs"))
    policy.lose(b"c" * 16)
    assert policy.judge.unavailable_reason("nccl", FAR) == ""
    assert policy.judge.unavailable_reason("nccl", NEAR)
