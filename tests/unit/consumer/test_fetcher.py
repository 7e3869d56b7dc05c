"""Fetching a batch: who is asked, what an error becomes, and that nothing is left under way."""

from __future__ import annotations

import ctypes
import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    ObjectFetchTimedOutError,
    ObjectLostError,
)

from ray.experimental.rdt._agent import AgentError
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.errors import RDTFetchError, RDTProducerDiedError
from ray.experimental.rdt.consumer.agent_transfer import AgentPull
from ray.experimental.rdt.consumer.fetcher import FetchedValue, Fetcher, Request
from ray.experimental.rdt.consumer.receive_buffers import allocate
from ray.experimental.rdt.consumer.targets import Target, Targets
from ray.experimental.rdt.producer.tensor_store import TensorStore
from ray.experimental.rdt.serialization import capture, layout
from ray.experimental.rdt.serialization.envelope import Envelope
from ray.experimental.rdt.transports.selection import Pair
from tests.unit.serialization.test_capture import Context

ADDRESS = b"\x01\x00" + b"A" * 16


def agent_error(code: str) -> AgentError:
    return AgentError(code, f"the agent says {code}")


class Block:
    """Memory, as the receive pool gives it."""

    def __new__(cls, nbytes: int) -> Any:
        block = (type("Sized", (ctypes.c_uint8 * nbytes,), {}))()
        block.address = ctypes.addressof(block)
        return block


@dataclass
class FakePull:
    """One pull: copies at ``wait``, or raises what the agent was told to."""

    outcome: list[tuple[int, int]] | Exception
    addresses: Any
    lengths: Any
    done: bool = False
    lane: str = "cma"
    cancelled: bool = False
    keep: Any = None

    def wait(self, timeout_s: float) -> None:
        if isinstance(self.outcome, TimeoutError):
            raise self.outcome
        self.done = True
        if isinstance(self.outcome, Exception):
            raise self.outcome
        brought = memoryview(self.outcome)
        for target, nbytes in zip(self.addresses, self.lengths):
            ctypes.memmove(target, bytes(brought[:nbytes]), nbytes)
            brought = brought[nbytes:]

    def cancel(self) -> None:
        self.done = self.cancelled = True


@dataclass
class FakeAgent:
    """The bytes of objects by key. A key that stands for an error raises it."""

    held: dict[bytes, Any] = field(default_factory=dict)
    pulls: list[FakePull] = field(default_factory=list)

    def allocate(self, nbytes: int) -> Any:
        return Block(nbytes)

    def pull(
        self, address: bytes, key: bytes, addresses: Any, lengths: Any, with_checksum: bool = False
    ) -> FakePull:
        assert address == ADDRESS
        self.pulls.append(
            FakePull(self.held.get(key, agent_error("not_found")), addresses, lengths)
        )
        return self.pulls[-1]


class World:
    """A producer's captured values, and a consumer with a fake agent that holds them."""

    def __init__(self) -> None:
        self.agent = FakeAgent()
        self.store = TensorStore()
        self.link_uses = 0
        self.kept: list[Any] = []
        self.hints: dict[bytes, AgentPull] = {}
        self.has_room = True
        self.fetcher = Fetcher(self.store, self.links)

    def links(self) -> Any:
        self.link_uses += 1
        session = SimpleNamespace(agent=self.agent)
        hinted = SimpleNamespace(take=lambda key: self.hints.pop(key, None), park=self.park)
        policy = SimpleNamespace(pair=lambda address: Pair())
        return SimpleNamespace(session=session, prefetcher=hinted, transports=None, policy=policy)

    def park(self, key: bytes, pull: AgentPull, nbytes: int) -> bool:
        if self.has_room:
            self.hints[key] = pull
        return self.has_room

    def send(self, value: Any, *, outcome: Any = None, eager: bool = False) -> Envelope:
        """Return the arrival of a value whose pull ends with ``outcome``, or with its bytes."""
        skeleton, captured = capture.take(Context(), value)
        key = len(self.kept).to_bytes(16, "little")
        self.kept.append(captured)
        self.agent.held[key] = captured.gather() if outcome is None else outcome
        head = Descriptor(key, captured.table.nbytes, b"p" * 16, "auto", ADDRESS, eager)
        bytes_along = captured.gather() if eager else None
        return Envelope(head, skeleton.inband, captured.table, bytes_along, skeleton.buffers)

    def fetch(
        self, *envelopes: Envelope, timeout_s: float | None = None, **target: Any
    ) -> list[Any]:
        requests = [
            Request(f"id{index}", envelope, Target(**target))
            for index, envelope in enumerate(envelopes)
        ]
        return self.fetcher.fetch(requests, timeout_s)


@pytest.fixture
def world() -> World:
    return World()


def value_of(arrival: Any) -> Any:
    assert isinstance(arrival, FetchedValue), arrival
    (value,) = arrival.unpickle()
    return value


def test_empty_batch_asks_nobody(world: World):
    assert world.fetch() == []
    assert world.link_uses == 0


def test_batch_keeps_its_order_and_moves_at_once(world: World):
    sent = [world.send({"t": torch.full((50,), float(i)), "i": i}) for i in range(5)]
    got = [value_of(arrival) for arrival in world.fetch(*sent)]
    assert [value["i"] for value in got] == [0, 1, 2, 3, 4]
    assert [value["t"].mean().item() for value in got] == [0, 1, 2, 3, 4]
    assert len(world.agent.pulls) == 5


def test_eager_value_asks_nobody(world: World):
    got = value_of(*world.fetch(world.send([torch.arange(5), torch.ones(3, 2)], eager=True)))
    assert got[0].tolist() == [0, 1, 2, 3, 4]
    assert got[1].shape == (3, 2)
    assert world.link_uses == 0


def test_own_value_is_the_very_tensor_and_asks_nobody(world: World):
    tensor = torch.ones(5)
    envelope = world.send([tensor])
    world.store.add(envelope.head.key, "id0", world.kept[0], "auto")
    assert value_of(*world.fetch(envelope))[0] is tensor
    assert world.link_uses == 0


def test_large_and_small_regions_land_together(world: World):
    tensors = [torch.arange(1 << 19), torch.arange(7), torch.empty(0), torch.arange(1 << 18)]
    got = value_of(*world.fetch(world.send(tensors)))
    assert all(torch.equal(one, other) for one, other in zip(got, tensors, strict=True))


def test_failed_hint_is_pulled_anew(world: World):
    """It may have failed long ago, for a reason that has passed."""
    envelope = world.send([torch.arange(5)], outcome=agent_error("peer_lost"))
    key, session = envelope.head.key, world.links().session
    world.hints[key] = AgentPull(session, ADDRESS, key, allocate(session, envelope.table.regions))
    world.agent.held[key] = world.kept[0].gather()
    assert value_of(*world.fetch(envelope))[0].tolist() == [0, 1, 2, 3, 4]
    assert len(world.agent.pulls) == 2


def test_pull_goes_on_when_only_the_users_time_is_over(world: World):
    envelope = world.send([torch.arange(5)], outcome=TimeoutError())
    for _ in range(3):
        with pytest.raises(GetTimeoutError):
            world.fetch(envelope, timeout_s=0)
    (pull,) = world.agent.pulls
    assert not pull.cancelled
    pull.outcome = world.kept[0].gather()
    assert value_of(*world.fetch(envelope, timeout_s=0))[0].tolist() == [0, 1, 2, 3, 4]
    assert not world.hints


def test_pull_into_the_users_memory_ends_with_the_users_time(world: World):
    envelope, target = world.send([torch.ones(5)], outcome=TimeoutError()), torch.zeros(5)
    with pytest.raises(GetTimeoutError):
        world.fetch(envelope, timeout_s=0, tensors=[target])
    assert world.agent.pulls[0].cancelled
    assert not world.hints


def test_full_device_is_told_with_advice(world: World):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has")
    (failure,) = world.fetch(world.send([torch.ones(5)], outcome=error))
    assert isinstance(failure, RDTFetchError)
    for part in ("device memory", "20.00 GiB. GPU 0", "fetch fewer at a time", "empty_cache"):
        assert part in str(failure)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered",
        "AcceleratorError: CUDA error: device-side assert triggered",
        "cudaIpcOpenMemHandle failed: cudaErrorECCUncorrectable",
        "CUDA error: uncorrectable ECC error encountered",
    ],
)
def test_failed_device_is_named_as_such(world: World, text: str):
    wrapped = ValueError("nothing came")
    wrapped.__cause__ = RuntimeError(text)
    for error in (RuntimeError(text), wrapped):
        (failure,) = world.fetch(world.send([torch.ones(5)], outcome=error))
        assert isinstance(failure, RDTFetchError)
        assert "a device has failed" in str(failure)
        assert "restart its actor" in str(failure)


def test_what_has_begun_is_given_up_when_the_next_cannot_begin(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    sent = [world.send([torch.arange(5)]) for _ in range(2)]
    pull = world.agent.pull

    def interrupt(*args: Any) -> Any:
        if world.agent.pulls:
            raise KeyboardInterrupt
        return pull(*args)

    monkeypatch.setattr(world.agent, "pull", interrupt)
    with pytest.raises(KeyboardInterrupt):
        world.fetch(*sent)
    assert world.agent.pulls[0].cancelled


@pytest.mark.parametrize("eager", [True, False])
def test_targets_receive(world: World, eager: bool):
    sent = [torch.arange(6.0).view(2, 3), torch.ones(4)]
    targets = [torch.zeros(2, 3), torch.zeros(8)[::2]]
    got = value_of(*world.fetch(world.send(sent, eager=eager), tensors=targets))
    assert [one is two for one, two in zip(got, targets, strict=True)] == [True, True]
    assert all(torch.equal(one, two) for one, two in zip(targets, sent))


def test_fitting_target_is_written_without_a_copy_between(world: World):
    target = torch.zeros(100)
    world.fetch(world.send([torch.ones(100)]), tensors=[target])
    assert list(world.agent.pulls[0].addresses) == [target.data_ptr()]


def test_target_of_an_own_value_is_filled(world: World):
    tensor, target = torch.arange(5.0), torch.zeros(5)
    envelope = world.send([tensor])
    world.store.add(envelope.head.key, "id0", world.kept[0], "auto")
    assert value_of(*world.fetch(envelope, tensors=[target]))[0] is target
    assert torch.equal(target, tensor)


@pytest.mark.parametrize(
    ("outcome", "kind", "says"),
    [
        (agent_error("peer_lost"), ActorDiedError, "is gone"),
        (agent_error("unreachable"), ActorDiedError, "is gone"),
        (agent_error("not_found"), RDTFetchError, "does not hold it any more"),
        (agent_error("size_mismatch"), RDTFetchError, "size_mismatch"),
        (agent_error("auth"), RDTFetchError, "auth"),
        (TimeoutError("slow"), ObjectFetchTimedOutError, "60 s"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            RDTFetchError,
            "Install torch",
        ),
        (OSError("disk is full."), RDTFetchError, "disk is full"),
    ],
    ids=lambda value: str(value) if isinstance(value, Exception) else "",
)
def test_failure_becomes_an_error_that_says_what_where_and_why(
    world: World, outcome: Exception, kind: type, says: str
):
    (error,) = world.fetch(world.send(torch.ones(5), outcome=outcome))
    assert isinstance(error, kind)
    assert isinstance(error, ObjectLostError)
    assert isinstance(error, ActorDiedError) == (kind is ActorDiedError)
    for part in (says, "id0", "auto", "cma", (b"p" * 16).hex()):
        assert part in str(error)
    assert ".." not in str(error)
    assert error.__cause__ is outcome
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))


def test_one_failure_leaves_the_others_alone(world: World):
    sent = [
        world.send([torch.ones(5)]),
        world.send([torch.ones(5)], outcome=agent_error("peer_lost")),
        world.send([torch.ones(5)]),
    ]
    first, second, third = world.fetch(*sent)
    assert value_of(first)[0].sum() == value_of(third)[0].sum() == 5
    assert isinstance(second, RDTProducerDiedError)


@pytest.mark.parametrize("has_room", [True, False])
def test_users_timeout_is_raised_and_pulls_go_on_where_there_is_room(world: World, has_room: bool):
    world.has_room = has_room
    sent = [world.send([torch.ones(5)], outcome=TimeoutError()) for _ in range(3)]
    with pytest.raises(GetTimeoutError, match="id0"):
        world.fetch(*sent, timeout_s=0.01)
    assert [pull.cancelled for pull in world.agent.pulls] == [not has_room] * 3


def test_what_no_time_would_bring_is_said_also_to_the_impatient(world: World):
    sent = world.send([torch.ones(5)], outcome=agent_error("not_found"))
    (error,) = world.fetch(sent, timeout_s=0)
    assert isinstance(error, RDTFetchError)


def test_users_timeout_is_raised_whatever_a_transport_made_of_it(world: World):
    sent = world.send([torch.ones(5)], outcome=OSError("not made in time"))
    with pytest.raises(GetTimeoutError, match="id0"):
        world.fetch(sent, timeout_s=0)


def test_death_that_a_transport_wraps_is_still_a_death(world: World):
    wrapped = RuntimeError("no connection")
    wrapped.__cause__ = agent_error("unreachable")
    (error,) = world.fetch(world.send([torch.ones(5)], outcome=wrapped))
    assert isinstance(error, RDTProducerDiedError)


def test_own_timeout_is_an_error_and_everything_is_given_up(world: World):
    sent = [world.send([torch.ones(5)], outcome=TimeoutError()) for _ in range(2)]
    for error in world.fetch(*sent, timeout_s=None):
        assert isinstance(error, ObjectFetchTimedOutError)
    assert [pull.cancelled for pull in world.agent.pulls] == [True] * 2


def test_interrupt_gives_everything_up(world: World):
    sent = [world.send([torch.ones(5)], outcome=TimeoutError()) for _ in range(2)]
    world.agent.held[sent[0].head.key] = world.kept[0].gather()

    class Interrupted(FakePull):
        def wait(self, timeout_s: float) -> None:
            raise KeyboardInterrupt

    plain_pull = world.agent.pull

    def pull(*arguments: Any) -> FakePull:
        made = plain_pull(*arguments)
        made.__class__ = Interrupted
        return made

    world.agent.pull = pull  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        world.fetch(*sent)
    assert [made.cancelled for made in world.agent.pulls] == [True] * 2


def test_target_device_moves_the_tensors(world: World):
    got = value_of(*world.fetch(world.send([torch.ones(5)]), device="meta"))
    assert got[0].device.type == "meta"


# Targets.


def table_of(*tensors: torch.Tensor) -> Any:
    return layout.lay_out(list(tensors)).table


def test_target_holds_until_it_is_replaced_or_forgotten():
    known, tensor, other = Targets(), torch.zeros(3), torch.zeros(3)
    table = table_of(torch.ones(3))
    known.set_tensors("o", [tensor])
    assert known.of("o", table).tensors[0] is tensor
    assert known.of("o", table).tensors[0] is tensor
    known.set_tensors("o", [other])
    assert known.of("o", table).tensors[0] is other
    known.set_device("o", "cpu")
    assert known.of("o", table) == Target(device="cpu")
    known.forget("o")
    assert known.of("o", table) == Target()


def test_target_keeps_its_tensors_until_they_have_received_once():
    known, kept = Targets(), torch.zeros(3)
    table = table_of(torch.ones(3), torch.ones(3))
    known.set_tensors("o", [kept, torch.zeros(3)])
    target = known.of("o", table)
    assert target.tensors[0] is kept
    known.received("o", target)
    assert known.of("o", table).tensors[1] is target.tensors[1]
    del target
    assert known.of("o", table) == Target()
    known.set_tensors("another", [kept])
    assert len(known) == 1


def test_target_of_later_is_not_weakened_by_what_an_earlier_one_received():
    known, table = Targets(), table_of(torch.ones(3))
    known.set_tensors("o", [torch.zeros(3)])
    earlier = known.of("o", table)
    known.set_tensors("o", [torch.full((3,), 2.0)])
    known.received("o", earlier)
    assert known.of("o", table).tensors[0].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([torch.zeros(4)], r"target 0 has shape \(4,\), the object's tensor has \(3,\)"),
        ([torch.zeros(3, dtype=torch.int8)], r"target 0 has dtype torch.int8, .* torch.float32"),
        ([], "0 target tensors were given, the object has 1"),
    ],
)
def test_target_that_does_not_fit_is_refused_once(targets: list[torch.Tensor], message: str):
    known, table = Targets(), table_of(torch.ones(3))
    known.set_tensors("o", targets)
    with pytest.raises(ValueError, match=message):
        known.of("o", table)
    assert known.of("o", table) == Target()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "target 1 is a NoneType"),
        ([1.0], "target 1 is a list"),
        (torch.zeros(3, device="meta"), "target 1 .*meta"),
        (torch.eye(3).to_sparse(), "target 1 .*sparse"),
    ],
)
def test_what_cannot_receive_is_refused_at_once(target: Any, message: str):
    with pytest.raises(ValueError, match=message):
        Targets().set_tensors("o", [torch.zeros(3), target])
