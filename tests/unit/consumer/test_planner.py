"""The plan of a transfer: candidates, their order, and the reason of each that is out."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RayError

from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.consumer.planner import (
    AGENT_LANES,
    STRICT,
    Candidate,
    Fallback,
    Kind,
    Offers,
    TransferObject,
    candidate_transports,
    may_fall_back,
    plan_transfer,
)
from ray.experimental.rdt.rpc.checksums import ChecksumMismatch
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.selection import Pair

NEAR, FAR, STRICT_PAIR = Pair(), Pair(is_same_host=False, has_rdma=True), Pair(is_strict=True)
ON_DEVICE = TransferObject(
    device_type="cuda", default_transports=("cuda_ipc", "nixl", "nccl", "staged"), nbytes=9
)
IN_HOST = TransferObject(default_transports=("nixl",), nbytes=9)


def summary(plan: list[Candidate]) -> list[str]:
    """The candidates that serve, and in brackets the others with their reason."""
    return [c.name if c.serves else f"({c.name}: {c.reason})" for c in plan]


NOT_HERE = [
    "(inproc: the producer is another process)",
    "(eager: the 9 bytes are not in the value)",
]


@pytest.mark.parametrize(
    ("obj", "pair", "expected"),
    [
        pytest.param(
            IN_HOST, NEAR, ["(nixl: on one host only where it is named)", "agent"], id="one host"
        ),
        pytest.param(IN_HOST, FAR, ["nixl", "agent"], id="rdma"),
        pytest.param(
            IN_HOST,
            FAR._replace(has_rdma=False),
            ["(nixl: this host has no RDMA device)", "agent"],
            id="no rdma",
        ),
        pytest.param(
            IN_HOST,
            FAR._replace(forbidden=frozenset({"nixl"})),
            ["(nixl: forbidden by RAY_RDT_LANES)", "agent"],
            id="forbidden",
        ),
        pytest.param(
            IN_HOST,
            FAR._replace(failures={"nixl": "OSError: cut"}),
            ["(nixl: it failed within the last minute: OSError: cut)", "agent"],
            id="failed before",
        ),
        pytest.param(
            IN_HOST._replace(is_prefetched=True),
            FAR,
            ["prefetched", "nixl", "agent"],
            id="prefetched",
        ),
        pytest.param(
            IN_HOST._replace(transport="nixl"),
            Pair(forbidden=frozenset({"nixl"}), failures={"nixl": "OSError: cut"}),
            ["nixl", "agent"],
            id="the rules do not apply to a named transport",
        ),
        pytest.param(IN_HOST._replace(transport="gloo"), FAR, ["gloo", "agent"], id="named"),
        pytest.param(
            IN_HOST._replace(transport="gloo"),
            STRICT_PAIR,
            ["gloo", f"(agent: {STRICT})"],
            id="strict",
        ),
        pytest.param(
            IN_HOST,
            STRICT_PAIR._replace(is_same_host=False, has_rdma=True),
            ["nixl", "agent"],
            id="strict without a name",
        ),
        pytest.param(
            IN_HOST._replace(transport="shm", is_user_defined=True),
            NEAR,
            ["shm", "agent"],
            id="user-defined",
        ),
        pytest.param(
            IN_HOST._replace(transport="shm", is_user_defined=True, is_foreign=True),
            NEAR,
            ["shm", "(agent: moves torch tensors only)"],
            id="foreign data",
        ),
        pytest.param(
            ON_DEVICE,
            NEAR,
            ["cuda_ipc", "(nixl: on one host only where it is named)", "nccl", "staged"],
            id="device on one host",
        ),
        pytest.param(
            ON_DEVICE,
            FAR,
            ["(cuda_ipc: the producer is on another host)", "nixl", "nccl", "staged"],
            id="device between hosts",
        ),
        pytest.param(
            ON_DEVICE._replace(transport="nccl"),
            NEAR,
            ["nccl", "cuda_ipc", "(nixl: on one host only where it is named)", "staged"],
            id="device, named",
        ),
        pytest.param(
            ON_DEVICE._replace(transport="cuda_ipc", is_shareable=True),
            STRICT_PAIR,
            [
                "cuda_ipc",
                "cuda_ipc",
                "(nixl: on one host only where it is named)",
                f"(nccl: {STRICT})",
                f"(staged: {STRICT})",
            ],
            id="device, shared",
        ),
    ],
)
def test_plan(obj: TransferObject, pair: Pair, expected: list[str]):
    assert summary(plan_transfer(obj, pair)) == [*NOT_HERE, *expected]


def test_object_without_bytes_needs_no_transport():
    obj = IN_HOST._replace(transport="gloo", nbytes=0)
    for pair in (NEAR, STRICT_PAIR):
        assert summary(plan_transfer(obj, pair))[2:] == [
            "(gloo: the object has no bytes)",
            "agent",
        ]
    foreign = obj._replace(transport="shm", is_user_defined=True, is_foreign=True)
    assert summary(plan_transfer(foreign, NEAR))[2] == "shm"


def test_object_that_is_here_needs_no_producer():
    local, inline = IN_HOST._replace(is_local=True), IN_HOST._replace(is_inline=True)
    assert summary(plan_transfer(local, None)) == ["inproc", NOT_HERE[1]]
    assert summary(plan_transfer(inline, None)) == [NOT_HERE[0], "eager"]
    assert summary(plan_transfer(local, FAR)) == ["inproc", NOT_HERE[1], "nixl", "agent"]


def test_what_both_sides_say_is_a_reason():
    offers = Offers({"gloo": "at the producer: no torch"}, dict.fromkeys(AGENT_LANES, ""))
    plan = plan_transfer(IN_HOST._replace(transport="gloo"), NEAR, offers)
    assert summary(plan)[2:] == ["(gloo: at the producer: no torch)", "cma", "map", "shm", "tcp"]
    assert all(candidate.reason for candidate in plan)


def test_rules_come_before_what_both_sides_say():
    plan = plan_transfer(IN_HOST, NEAR, Offers({"nixl": "at the consumer: no library"}))
    assert not plan[2].serves
    assert "on one host" in plan[2].reason


@pytest.mark.parametrize(
    ("transport", "device_type", "expected"),
    [
        ("auto", "cpu", ["nixl"]),
        ("gloo", "cpu", ["gloo"]),
        ("auto", "cuda", ["cuda_ipc", "staged"]),
        ("nixl", "cuda", ["nixl", "cuda_ipc", "staged"]),
        ("cuda_ipc", "cuda", ["cuda_ipc", "staged"]),
    ],
)
def test_order_of_transports(transport: str, device_type: str, expected: list[str]):
    default = ["nixl"] if device_type == "cpu" else ["cuda_ipc", "staged"]
    assert [*candidate_transports(TransferObject(transport, device_type, default))] == expected


@pytest.mark.parametrize(
    ("fallback", "error", "is_late", "expected"),
    [
        (Fallback.NEVER, TransportUnavailable(), False, False),
        (Fallback.ALWAYS, TransferFailed("it failed", "not_found"), False, True),
        (Fallback.ALWAYS, TimeoutError(), True, False),
        (Fallback.IF_UNAVAILABLE, TransportUnavailable(), True, True),
        (Fallback.IF_UNAVAILABLE, ChecksumMismatch(), False, True),
        (Fallback.IF_UNAVAILABLE, TransferFailed(), False, False),
        (Fallback.IF_FAILED, TransportUnavailable(), True, True),
        (Fallback.IF_FAILED, ChecksumMismatch(), False, True),
        (Fallback.IF_FAILED, TransferFailed("it failed", "peer_lost"), False, True),
        (Fallback.IF_FAILED, TimeoutError(), False, True),
        (Fallback.IF_FAILED, TimeoutError(), True, False),
        (Fallback.IF_FAILED, TransferFailed("it failed", "not_found"), False, False),
        (Fallback.IF_FAILED, TransferFailed("it failed", "changed"), False, False),
        (Fallback.IF_FAILED, TransferFailed(may_still_write=True), False, False),
        (Fallback.IF_FAILED, MemoryError(), False, False),
        (Fallback.IF_FAILED, RayError(), False, False),
    ],
    ids=str,
)
def test_fallback(fallback: Fallback, error: Exception, is_late: bool, expected: bool):
    candidate: Any = Candidate("one", Kind.TRANSPORT, fallback)
    assert may_fall_back(candidate, error, is_late) is expected
