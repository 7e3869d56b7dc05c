"""The requests between sessions: their names, bodies and encoding.

A request is its name, a zero byte, and its body in msgpack. So the reaper finds the name without
parsing the body. An answer is one msgpack map: ``body``, or ``error`` and ``code``.

A body that lacks a field, or has one of another type, is refused before its handler sees it.
"""

from __future__ import annotations

import math
from types import UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints

import msgpack

#: The longest name of a request.
_MAX_NAME_BYTES = 1024
# Error texts may hold file names that are not UTF-8.
_TEXT_ERRORS = "surrogatepass"

#: By the name of a request: the types of the fields of its body.
_FIELDS: dict[str, dict[str, Any]] = {}


def _request(op: str, body: type) -> str:
    """Return the name of a request after a note of its body's type."""
    _FIELDS[op] = get_type_hints(body)
    return op


def of_transport(op: str, transport: str) -> str:
    """Return the name of a request that each of several transports has for itself."""
    return f"{op}/{transport}"


class Pull(TypedDict):
    """An object's memory on the torch device type ``device``; the route is the transport's."""

    key: bytes
    transport: str
    device: str
    route: dict[str, Any]
    timeout_s: float


class Done(TypedDict):
    """The consumer has read the object of this key."""

    key: bytes


class Hint(TypedDict):
    """An object, its producer's agent, and the bytes of each of its regions."""

    key: bytes
    address: bytes
    regions: list[int]


class StreamOpen(TypedDict):
    """A producer makes items of a stream; ``address`` is its agent's."""

    stream: str
    address: bytes


class StreamClose(TypedDict):
    """The caller takes no more items of a stream."""

    stream: str


class MayOwn(TypedDict):
    """Pairs of an object's id and key."""

    objects: list[list[Any]]


class Reconstruct(TypedDict):
    """``waiting_actor`` is the consumer's actor if that runs nothing else meanwhile, else ""."""

    object_id: str
    key: bytes
    waiting_actor: str


class Offers(TypedDict):
    """``devices`` are torch device types, None for all of the producer's."""

    transport: str
    devices: list[str] | None


class Explain(TypedDict):
    """The fields of ``explainer.Question``, and how long the answer may take."""

    address: bytes
    obj: list[Any]
    timeout_s: float


class GroupJoin(TypedDict):
    """A group and the rank that the member has in it."""

    id: str
    name: str
    backend: str
    rank: int
    members: list[list[Any]]


class GroupConnect(TypedDict):
    """``creator`` is the address of the agent to report to."""

    id: str
    timeout_s: float
    creator: bytes


class GroupReport(TypedDict):
    """``error`` is why the member could not connect, "" if it is connected."""

    id: str
    rank: int
    error: str


class GroupLeave(TypedDict):
    """The member forgets the group; its transfers fail with the reason."""

    id: str
    reason: str


class LinkOpen(TypedDict):
    """A link that the consumer, whose agent is at ``address``, wants within a scope."""

    transport: str
    link: str
    scope: str
    address: bytes


class LinkSet(TypedDict):
    """One entry of the store by which a process group is set up."""

    transport: str
    link: str
    key: str
    value: bytes


class LinkClose(TypedDict):
    """The other end closes its link."""

    transport: str
    link: str
    reason: str


class StagedChunk(TypedDict):
    """The bytes ``start`` to ``stop`` of all buffers of an exposure."""

    exposure: int
    start: int
    stop: int
    timeout_s: float


class MemoryShare(TypedDict):
    """Asks for the place of an exposure; the producer keeps it as the loan of process ``pid``."""

    exposure: int
    loan: str
    pid: int
    address: bytes
    timeout_s: float


class MemoryLoan(TypedDict):
    """``MEMORY_KEEP`` and ``MEMORY_CLOSE``."""

    loan: str


class MemoryGone(TypedDict):
    """The producer has withdrawn an exposure."""

    exposure: int


class UserEnd(TypedDict):
    """One end of a transfer has failed."""

    transfer: str
    reason: str


# The names of the requests, each with the type of its body.

# Consumer to producer: one object over a transport.
SEND = _request("rdt.send", Pull)
EXPOSE = _request("rdt.expose", Pull)
LEND = _request("rdt.lend", Pull)
DONE = _request("rdt.done", Done)
# Owner to consumer: an object that a task of the consumer will need.
HINT = _request("rdt.hint", Hint)
# Between the producer and the caller of a generator.
STREAM_OPEN = _request("rdt.stream.open", StreamOpen)
STREAM_CLOSE = _request("rdt.stream.close", StreamClose)
# To any process: its objects, reconstruction, and its transports.
MAY_OWN = _request("rdt.may_own", MayOwn)
RECONSTRUCT = _request("rdt.reconstruct", Reconstruct)
OFFERS = _request("rdt.offers", Offers)
EXPLAIN = _request("rdt.explain", Explain)
# Between the creator of a collective group and its members.
GROUP_JOIN = _request("rdt.group.join", GroupJoin)
GROUP_CONNECT = _request("rdt.group.connect", GroupConnect)
GROUP_REPORT = _request("rdt.group.report", GroupReport)
GROUP_LEAVE = _request("rdt.group.leave", GroupLeave)
# Between the two ends of a link of a process group transport.
LINK_OPEN = _request("rdt.link.open", LinkOpen)
LINK_SET = _request("rdt.link.set", LinkSet)
LINK_CLOSE = _request("rdt.link.close", LinkClose)
# Consumer to producer: a part of an object that goes through host memory.
STAGED_CHUNK = _request("rdt.staged.chunk", StagedChunk)
# Between the processes that share device memory. One name for each transport: ``of_transport``.
MEMORY_SHARE = _request("rdt.memory.share", MemoryShare)
MEMORY_KEEP = _request("rdt.memory.keep", MemoryLoan)
MEMORY_CLOSE = _request("rdt.memory.close", MemoryLoan)
MEMORY_GONE = _request("rdt.memory.gone", MemoryGone)
# Between the two ends of a transfer by a user's transport. One name for each transport.
USER_END = _request("rdt.user.end", UserEnd)


class MalformedMessage(ValueError):
    """Raised if a peer sent bytes that are no request or no answer."""


def encode_request(op: str, body: Any) -> bytes:
    return op.encode() + b"\0" + pack(body)


def op_of(request: bytes) -> str:
    """Return a request's name, "" if it has none. Never raises; does not look at the body."""
    end = request.find(b"\0", 0, _MAX_NAME_BYTES)
    return request[: max(0, end)].decode(errors="replace")


def body_of(request: bytes) -> dict[str, Any]:
    """Return a request's body.

    Raises:
        MalformedMessage: It is no request, or lacks a field that requests of this name need.
    """
    body = unpack(request.partition(b"\0")[2])
    if not isinstance(body, dict):
        raise MalformedMessage("the body of a request is a map")
    for name, hint in _FIELDS.get(op_of(request).partition("/")[0], {}).items():
        if name not in body or not _fits(body[name], hint):
            raise MalformedMessage(f"the request lacks {name!r}, or has another type of it")
    return body


def encode_answer(body: Any) -> bytes:
    return pack({"body": body})


def encode_error(error: str, code: str) -> bytes:
    return pack({"error": error, "code": code})


def decode_answer(answer: bytes) -> dict[str, Any]:
    """Return an answer: a map with "body", or with "error" and "code". Raises MalformedMessage."""
    decoded = unpack(answer)
    if not isinstance(decoded, dict) or not (
        isinstance(decoded.get("body"), dict)
        or (isinstance(decoded.get("error"), str) and isinstance(decoded.get("code"), str))
    ):
        raise MalformedMessage("the answer of a request is a map with a body or an error")
    return decoded


def pack(value: Any) -> bytes:
    """Return a value of lists, maps, texts, bytes and numbers in msgpack."""
    packed: bytes = msgpack.packb(value, unicode_errors=_TEXT_ERRORS)
    return packed


def unpack(packed: bytes) -> Any:
    """Reverse ``pack``, with lists for tuples. Raises MalformedMessage."""
    try:
        return msgpack.unpackb(packed, unicode_errors=_TEXT_ERRORS)
    except ValueError as error:
        raise MalformedMessage(f"it is not msgpack: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of a type. The content of lists and maps is not checked."""
    if hint is float:
        return isinstance(value, (int, float)) and math.isfinite(value)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    return isinstance(value, get_origin(hint) or hint)
