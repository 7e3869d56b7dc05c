"""Bodies of requests between sessions, as bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ray.experimental.rdt.rpc import protocol

KEY = bytes(range(16))
PULL = protocol.Pull(key=KEY, transport="gloo", device="cpu", route={"tag": b"\xff"}, timeout_s=1)


def test_a_request_comes_back() -> None:
    request = protocol.encode_request(protocol.SEND, PULL)
    assert protocol.op_of(request) == protocol.SEND
    assert protocol.body_of(request) == PULL
    assert KEY in request  # not in hexadecimal digits


def test_text_that_is_not_utf8_comes_back() -> None:
    answer = protocol.encode_error("no file \udcff", "not_found")
    assert protocol.decode_answer(answer) == {"error": "no file \udcff", "code": "not_found"}


@pytest.mark.parametrize("request_", [b"", b"\0", b"rdt.done", b"\xff\xfe\0", b"x" * 5000 + b"\0"])
def test_the_name_is_found_in_whatever_arrives(request_: bytes) -> None:
    assert protocol.op_of(request_) not in (protocol.DONE, protocol.SEND)


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        None,
        {**PULL, "key": KEY.hex()},
        {**PULL, "timeout_s": "1"},
        {**PULL, "route": None},
        {name: value for name, value in PULL.items() if name != "device"},
    ],
)
def test_a_body_of_another_shape_is_refused(body: Any) -> None:
    with pytest.raises(protocol.MalformedMessage):
        protocol.body_of(protocol.encode_request(protocol.SEND, body))


def test_bytes_that_are_no_body_are_refused() -> None:
    for packed in (b"", b"\xc1", b"\x81", b"\x91" * 9999, b"\x80\x80"):
        with pytest.raises(protocol.MalformedMessage):
            protocol.body_of(protocol.DONE.encode() + b"\0" + packed)


def test_an_optional_field_may_be_none() -> None:
    body = protocol.Offers(transport="auto", devices=None)
    assert protocol.body_of(protocol.encode_request(protocol.OFFERS, body)) == body


def test_the_name_of_one_transports_request_has_the_same_body() -> None:
    op = protocol.of_transport(protocol.MEMORY_KEEP, "cuda_ipc")
    with pytest.raises(protocol.MalformedMessage):
        protocol.body_of(protocol.encode_request(op, {"loan": 1}))
    assert protocol.body_of(protocol.encode_request(op, {"loan": "1"})) == {"loan": "1"}


@pytest.mark.parametrize("timeout_s", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_no_number_of_seconds_is_refused(timeout_s: float) -> None:
    body = {"exposure": 1, "start": 0, "stop": 1, "timeout_s": timeout_s}
    with pytest.raises(protocol.MalformedMessage, match="timeout_s"):
        protocol.body_of(protocol.encode_request(protocol.STAGED_CHUNK, body))


@pytest.mark.parametrize(
    "answer", [[], {}, {"body": [1]}, {"error": "x"}, {"error": "x", "code": ["y"]}]
)
def test_an_answer_of_another_shape_is_refused(answer: Any) -> None:
    with pytest.raises(protocol.MalformedMessage):
        protocol.decode_answer(protocol.pack(answer))
