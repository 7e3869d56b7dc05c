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
def unnamed(monkeypatch: pytest.MonkeyPatch) -> Any:
    lost: list[Any] = []
    session: Any = SimpleNamespace(address=HERE, on_peer_lost=lost.append)
    monkeypatch.setattr(ways, "_has_rdma", lambda: True)
    made = ways.Unnamed(session)
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
def test_what_rules_a_transport_out(unnamed: Any, name: str, producer: bytes, why: str) -> None:
    obstacle = unnamed.judge.obstacle(name, producer)
    assert why in obstacle
    assert bool(why) == bool(obstacle)


def test_nixl_is_not_taken_where_there_is_no_rdma(
    unnamed: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(ways, "_has_rdma", lambda: has_rdma(tmp_path))
    assert "no RDMA device" in unnamed.judge.obstacle("nixl", FAR)
    (tmp_path / "infiniband/mlx5_0").mkdir(parents=True)
    assert unnamed.judge.obstacle("nixl", FAR) == ""


def test_the_setting_forbids(unnamed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only_tcp = replace(settings(), lanes=frozenset({"tcp"}))
    monkeypatch.setattr(ways, "settings", lambda: only_tcp)
    for name in ("nixl", "nccl", "cuda_ipc"):
        assert "RAY_RDT_LANES" in unnamed.judge.obstacle(name, NEAR)
    assert unnamed.judge.obstacle("another_ipc", NEAR) == ""


def test_what_failed_is_left_alone_for_a_while(
    unnamed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(deadline.time, "monotonic", lambda: clock.now)
    unnamed.judge.failed("nixl", FAR, RuntimeError("the cable is out"))
    unnamed.judge.failed("cuda_ipc", NEAR, RuntimeError("an expandable segment"))
    assert "RuntimeError: the cable is out" in unnamed.judge.obstacle("nixl", FAR)
    assert unnamed.judge.obstacle("nccl", FAR) == ""
    assert unnamed.judge.obstacle("nixl", address(b"d", b"2")) == ""
    assert unnamed.judge.obstacle("cuda_ipc", NEAR) == ""
    clock.now += 61
    assert unnamed.judge.obstacle("nixl", FAR) == ""


def test_a_lost_peer_is_forgotten(unnamed: Any) -> None:
    unnamed.judge.failed("nccl", FAR, RuntimeError("it hangs"))
    unnamed.judge.failed("nccl", NEAR, RuntimeError("it hangs"))
    unnamed.lose(b"c" * 16)
    assert unnamed.judge.obstacle("nccl", FAR) == ""
    assert unnamed.judge.obstacle("nccl", NEAR)
