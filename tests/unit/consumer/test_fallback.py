"""The fallback from one candidate of a transfer to the next."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.consumer.agent_transfer import AgentTransfer
from ray.experimental.rdt.consumer.fallback import TransportFallbackChain
from ray.experimental.rdt.consumer.planner import STRICT, Candidate, Fallback, Kind
from ray.experimental.rdt.rpc.checksums import ChecksumMismatch
from ray.experimental.rdt.transports.base import TransportUnavailable

LIMIT_S = 100.0
ARRIVED: Any = ["tensors"]

NAMED = Candidate("gloo", Kind.TRANSPORT, Fallback.IF_UNAVAILABLE)
AUTO = Candidate("nixl", Kind.TRANSPORT, Fallback.IF_FAILED)
OUT = Candidate("nccl", Kind.TRANSPORT, Fallback.IF_FAILED, False, "no GPU")
AGENT = Candidate("agent", Kind.AGENT)
STRICT_AGENT = Candidate("agent", Kind.AGENT, serves=False, reason=STRICT)


@dataclass
class FakeTransfer:
    """Notes what is done to it; fails in one step if it is told to."""

    lane: str
    world: World
    fails_in: str = ""
    error: Exception | None = None

    def _do(self, step: str, deadline: Deadline | None = None) -> None:
        self.world.steps.append(f"{step} {self.lane}")
        if deadline is not None:
            self.world.limits_s[self.lane] = deadline.left_s()
        if step == self.fails_in and self.error is not None:
            raise self.error

    def start(self, deadline: Deadline) -> None:
        self._do("start", deadline)

    def finish(self, deadline: Deadline) -> Any:
        self._do("finish", deadline)
        return ARRIVED

    def abandon(self) -> None:
        self._do("abandon")


@dataclass
class World:
    """A session that notes log lines, and transfers that fail as told."""

    failing: dict[str, tuple[str, Exception]] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    limits_s: dict[str, float] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def chain(self, *candidates: Candidate, device_type: str = "cpu") -> TransportFallbackChain:
        services: Any = SimpleNamespace(
            session=SimpleNamespace(log_once=lambda text, level=0: self.log.append(text)),
            policy=SimpleNamespace(failed=lambda name, *_: self.failures.append(name)),
        )
        head = Descriptor(b"k" * 16, 9, b"p" * 16, "gloo", b"address", False)
        return TransportFallbackChain(services, head, device_type, candidates, self.make)

    def make(self, candidate: Candidate) -> FakeTransfer:
        return FakeTransfer(candidate.name, self, *self.failing.get(candidate.name, ("", None)))

    def run(self, *candidates: Candidate, device_type: str = "cpu") -> Any:
        chain = self.chain(*candidates, device_type=device_type)
        chain.start(Deadline.after(LIMIT_S))
        return chain.finish(Deadline.after(LIMIT_S))


def test_constructor_starts_nothing():
    world = World()
    chain = world.chain(NAMED, AGENT)
    assert world.steps == []
    assert chain.lane == ""
    chain.abandon()


def test_first_candidate_that_serves_is_used():
    world = World()
    assert world.run(OUT, NAMED, AGENT) is ARRIVED
    assert world.steps == ["start gloo", "finish gloo"]
    (line,) = world.log
    assert "lane gloo (the named transport)" in line


@pytest.mark.parametrize("step", ["start", "finish"])
def test_next_candidate_is_tried_after_one_that_is_unavailable(step: str):
    world = World({"gloo": (step, TransportUnavailable("no torch"))})
    assert world.run(NAMED, AGENT) is ARRIVED
    before = ["start gloo"] if step == "start" else ["start gloo", "finish gloo"]
    assert world.steps == [*before, "abandon gloo", "start agent", "finish agent"]
    (line,) = world.log
    assert "'gloo' cannot serve" in line
    assert "no torch" in line


def test_failure_of_a_named_transport_is_the_error_of_the_object():
    world = World({"gloo": ("finish", OSError("cut"))})
    with pytest.raises(OSError, match="cut"):
        world.run(NAMED, AGENT)
    assert "start agent" not in world.steps


def test_failure_of_an_automatic_transport_is_remembered():
    world = World({"nixl": ("finish", OSError("cut"))})
    assert world.run(AUTO, AGENT) is ARRIVED
    assert world.failures == ["nixl"]
    assert world.limits_s["nixl"] < LIMIT_S / 2 + 1
    assert world.limits_s["agent"] > LIMIT_S - 10


def test_candidates_that_the_plan_rules_out_are_logged_for_devices():
    world = World()
    world.run(OUT, Candidate("staged", Kind.TRANSPORT), device_type="cuda")
    assert "lane nccl does not serve" in world.log[0]
    assert "lane staged (the best for cuda" in world.log[1]
    assert world.failures == []


def test_strict_mode_is_an_error_that_names_the_setting():
    forbidden = AGENT._replace(serves=False, reason=STRICT)
    world = World({"gloo": ("start", TransportUnavailable("no torch"))})
    with pytest.raises(RDTError, match=r"'gloo' .*no torch.*RAY_RDT_STRICT_TRANSPORT=1"):
        world.run(NAMED, forbidden)
    world = World({"gloo": ("finish", ChecksumMismatch("wrong bytes"))})
    with pytest.raises(ChecksumMismatch):
        world.run(NAMED, forbidden)


def test_error_is_raised_where_no_candidate_is_left():
    world = World({"gloo": ("finish", TransportUnavailable("no torch"))})
    with pytest.raises(TransportUnavailable, match="no torch"):
        world.run(NAMED, AGENT._replace(serves=False, reason="moves torch tensors only"))
    with pytest.raises(TransportUnavailable, match="nccl: no GPU"):
        World().run(OUT)


def test_wrong_bytes_are_pulled_again():
    world = World({"gloo": ("finish", ChecksumMismatch("wrong bytes"))})
    assert world.run(NAMED, AGENT) is ARRIVED
    assert "wrong bytes" in world.log[0]


def test_only_pulls_of_the_agent_are_parked():
    kept: list[Any] = []
    world = World()
    chain = world.chain(NAMED)
    chain.start(Deadline.after(LIMIT_S))
    chain.park(lambda *what: bool(kept.append(what)))
    assert kept == []
    pull = SimpleNamespace(buffers=SimpleNamespace(has_user_memory=False))
    attempt = AgentTransfer(SimpleNamespace(), SimpleNamespace(key=b"k", nbytes=9), None)  # type: ignore[arg-type]
    attempt._pull = pull  # type: ignore[assignment]
    chain._attempt = attempt
    chain.park(lambda *what: not kept.append(what))
    assert kept == [(b"k", pull, 9)]
    chain.abandon()


@pytest.mark.parametrize("step", ["start", "finish"])
@pytest.mark.parametrize(
    "candidates", [[NAMED], [AGENT], [NAMED, STRICT_AGENT]], ids=["named", "agent", "strict"]
)
def test_error_that_ends_the_fetch_keeps_nothing_alive(step, candidates):
    """Receive memory and references are freed with the error, not by a later collection."""
    gc.collect()
    gc.disable()
    try:
        assert failed_chain(step, candidates)() is None
    finally:
        gc.enable()


class Breaking(FakeTransfer):
    """Fails by an error that nothing else refers to."""

    def _do(self, step: str, deadline: Deadline | None = None) -> None:
        if step == self.fails_in:
            raise TransportUnavailable("it broke")


def failed_chain(step: str, candidates: list[Candidate]) -> weakref.ref[Any]:
    """Run a chain that fails; return a reference that does not keep it alive."""
    world = World()
    world.make = lambda candidate: Breaking(candidate.name, world, step)  # type: ignore[method-assign]
    chain = world.chain(*candidates)
    failed = False
    try:
        chain.start(Deadline.after(LIMIT_S))
        chain.finish(Deadline.after(LIMIT_S))
    except (TransportUnavailable, RDTError):
        failed = True
    assert failed
    del world.make
    return weakref.ref(chain)
