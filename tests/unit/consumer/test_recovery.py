"""Objects whose producer died: who is asked, for how long, and what replaces them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RayError

import ray
from ray.experimental.rdt.common import deadline
from ray.experimental.rdt.common.descriptor import decode
from ray.experimental.rdt.common.errors import FetchContext, RDTProducerDiedError
from ray.experimental.rdt.consumer import recovery
from ray.experimental.rdt.consumer.fetcher import Request
from ray.experimental.rdt.consumer.recovery import PlainValue, Recovery
from ray.experimental.rdt.consumer.targets import Target
from ray.experimental.rdt.owner.reconstruction import (
    ALIVE,
    NOT_OWNER,
    RECONSTRUCTED,
    REFUSED,
    Outcome,
)
from ray.experimental.rdt.rpc import protocol
from tests.unit.fakes import Clock, FakeRay, FakeSession, object_id, rdt_value

KEY = b"lost".ljust(16)


class Consumer:
    """A process that fetches.

    Attributes:
        outcomes: What its own owner's part answers, one after the other; the last one stays.
        asked: The arguments of those questions.
        results: What its fetches of replacements return, one after the other.
        fetched: The requests of those fetches, and their timeouts.
    """

    def __init__(self, session: FakeSession) -> None:
        self.outcomes = [Outcome(NOT_OWNER)]
        self.asked: list[Any] = []
        self.results: list[Any] = []
        self.fetched: list[tuple[list[Request], float | None]] = []
        self.recovery = Recovery(self, self, lambda: session)  # type: ignore[arg-type]

    def reconstruct(self, *question: Any) -> Outcome:
        self.asked.append(question)
        return self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]

    def fetch(self, requests: list[Request], timeout_s: float | None) -> list[Any]:
        self.fetched.append((requests, timeout_s))
        return [self.results.pop(0) for _ in requests]

    def recover(
        self,
        results: Sequence[Any],
        refs: Sequence[Any],
        timeout_s: float | None = None,
        target: Any = None,
    ) -> list[Any]:
        envelope = SimpleNamespace(head=decode(rdt_value(KEY, 2)[1]))
        requests = [Request("its id", envelope, Target(target), ref) for ref in refs]
        return self.recovery.replace_lost(requests, results, 1000.0, timeout_s)


def lost() -> RDTProducerDiedError:
    context = FetchContext("its id", "auto", "", "producer 2")
    return RDTProducerDiedError(context, "it died", "Keep it alive.")


@pytest.fixture(autouse=True)
def clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock.install(monkeypatch, deadline, recovery)
    return clock


@pytest.fixture(autouse=True)
def _envelopes(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_envelope(metadata: bytes, data: Any) -> Any:
        return SimpleNamespace(head=decode(metadata), table="table")

    monkeypatch.setattr(recovery, "open_envelope", open_envelope)


@pytest.fixture
def consumer(process: Callable[[int], FakeSession]) -> Consumer:
    return Consumer(process(1))


@pytest.fixture
def owner(process: Callable[[int], FakeSession]) -> FakeSession:
    return process(4)


@pytest.fixture
def ref(fake_ray: FakeRay) -> Any:
    return fake_ray.create(1, rdt_value(KEY, 2))


def test_results_that_are_not_lost_stay(consumer: Consumer, ref: Any) -> None:
    results = ["arrived", RayError("another error")]
    assert consumer.recover(results, [ref, ref]) == results
    assert not consumer.asked


def test_the_replacement_is_fetched(consumer: Consumer, fake_ray: FakeRay, ref: Any) -> None:
    replacement = fake_ray.create(2, rdt_value(b"new", 3))
    consumer.outcomes = [Outcome(RECONSTRUCTED, replacement)]
    consumer.results = ["the replacement"]
    assert consumer.recover([lost(), "arrived"], [ref, ref]) == ["the replacement", "arrived"]
    assert consumer.asked == [(object_id(1), KEY, "")]
    ((request,), timeout_s) = consumer.fetched[0]
    assert request.envelope.head.key == b"new".ljust(16)
    assert timeout_s is None


def test_a_replacement_that_is_lost_is_replaced_again(
    consumer: Consumer, fake_ray: FakeRay, ref: Any
) -> None:
    first = fake_ray.create(2, rdt_value(b"first", 3))
    second = fake_ray.create(3, rdt_value(b"second", 4))
    consumer.outcomes = [Outcome(RECONSTRUCTED, first), Outcome(RECONSTRUCTED, second)]
    consumer.results = [lost(), "the second"]
    assert consumer.recover([lost()], [ref]) == ["the second"]
    assert [question[:2] for question in consumer.asked] == [
        (object_id(1), KEY),
        (object_id(2), b"first".ljust(16)),
    ]


def test_a_refusal_is_told(consumer: Consumer, ref: Any) -> None:
    consumer.outcomes = [Outcome(REFUSED, reason="no retries")]
    (error,) = consumer.recover([lost()], [ref])
    assert isinstance(error, RDTProducerDiedError)
    assert "no retries" in str(error)
    assert consumer.fetched == [([], None)]


def test_a_plain_value_replaces_an_object(consumer: Consumer, fake_ray: FakeRay, ref: Any) -> None:
    plain = fake_ray.create(2, ("seven", b"PYTHON", None))
    consumer.outcomes = [Outcome(RECONSTRUCTED, plain)]
    assert consumer.recover([lost()], [ref]) == [PlainValue("seven")]


def test_the_error_of_the_repeated_call_replaces_an_object(
    consumer: Consumer, fake_ray: FakeRay, ref: Any
) -> None:
    error = RayError("the call failed")
    plain = fake_ray.create(2, (error, b"PYTHON", None))
    consumer.outcomes = [Outcome(RECONSTRUCTED, plain)]
    assert consumer.recover([lost()], [ref]) == [error]


def test_a_plain_value_fits_no_target(consumer: Consumer, fake_ray: FakeRay, ref: Any) -> None:
    plain = fake_ray.create(2, ("seven", b"PYTHON", None))
    consumer.outcomes = [Outcome(RECONSTRUCTED, plain)]
    with pytest.raises(ValueError, match="no tensors to receive into"):
        consumer.recover([lost()], [ref], target=["a tensor"])


def test_targets_are_checked_against_the_replacement(
    consumer: Consumer, fake_ray: FakeRay, ref: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(recovery.targets, "check_targets", lambda *args: checked.append(args))
    consumer.outcomes = [Outcome(RECONSTRUCTED, fake_ray.create(2, rdt_value(b"new", 3)))]
    consumer.results = ["the replacement"]
    consumer.recover([lost()], [ref], target=["a tensor"])
    assert checked == [("table", ["a tensor"])]
    assert consumer.fetched[0][0][0].target.tensors == ["a tensor"]


def test_pauses_between_questions_grow(consumer: Consumer, ref: Any, clock: Clock) -> None:
    consumer.outcomes = [Outcome(ALIVE)] * 10 + [Outcome(REFUSED, reason="dead at last")]
    consumer.recover([lost()], [ref])
    assert clock.slept[:3] == [0.005, 0.01, 0.02]
    assert clock.slept[-2:] == [1.0, 1.0]


def test_a_producer_that_stays_alive_ends_the_questions(
    consumer: Consumer, ref: Any, clock: Clock
) -> None:
    consumer.outcomes = [Outcome(ALIVE)]
    (error,) = consumer.recover([lost()], [ref])
    assert "reports its producer as alive" in str(error)
    waited = clock.now - 1000.0
    limit = recovery.settings().fetch_timeout_s
    assert limit <= waited <= limit + 1.1


def test_the_users_timeout_ends_the_questions(consumer: Consumer, ref: Any, clock: Clock) -> None:
    consumer.outcomes = [Outcome(ALIVE)]
    with pytest.raises(GetTimeoutError, match="timed out before Ray reported"):
        consumer.recover([lost()], [ref], timeout_s=3.0)
    assert 3.0 <= clock.now - 1000.0 <= 4.1


def test_replacements_are_awaited(consumer: Consumer, fake_ray: FakeRay, ref: Any) -> None:
    replacement = fake_ray.create(2, rdt_value(b"new", 3))
    fake_ray.late[replacement.hex()] = 2
    consumer.outcomes = [Outcome(RECONSTRUCTED, replacement)]
    consumer.results = ["the replacement"]
    assert consumer.recover([lost()], [ref]) == ["the replacement"]
    assert fake_ray.waits_ms == [500, 1000, 2000]


def test_the_users_timeout_ends_the_wait_for_a_replacement(
    consumer: Consumer, fake_ray: FakeRay, ref: Any
) -> None:
    replacement = fake_ray.create(2, rdt_value(b"new", 3))
    fake_ray.late[replacement.hex()] = 100
    consumer.outcomes = [Outcome(RECONSTRUCTED, replacement)]
    with pytest.raises(GetTimeoutError):
        consumer.recover([lost()], [ref], timeout_s=0.25)
    assert fake_ray.waits_ms == [250]


@pytest.mark.parametrize(
    ("is_actor", "is_asyncio", "concurrency", "waiting"),
    [
        (False, False, 1, ""),
        (True, False, 1, b"actor".hex()),
        (True, True, 1, ""),
        (True, False, 2, ""),
    ],
)
def test_owners_learn_of_an_actor_that_only_waits(
    consumer: Consumer,
    fake_ray: FakeRay,
    ref: Any,
    is_actor: bool,
    is_asyncio: bool,
    concurrency: int,
    waiting: str,
) -> None:
    fake_ray.own_actor = b"actor" if is_actor else None
    fake_ray.is_asyncio, fake_ray.concurrency = is_asyncio, concurrency
    consumer.outcomes = [Outcome(REFUSED)]
    consumer.recover([lost()], [ref])
    assert consumer.asked[0][2] == waiting


def answer(owner: FakeSession, state: str, reason: str = "") -> None:
    owner.serve(protocol.RECONSTRUCT, lambda peer, body: {"state": state, "reason": reason})


def test_the_owner_is_asked(consumer: Consumer, owner: FakeSession, fake_ray: FakeRay) -> None:
    borrowed = fake_ray.create(1, rdt_value(KEY, 2), owner=owner.worker_id)
    replacement = fake_ray.create(2, rdt_value(b"new", 3), owner=owner.worker_id)
    asked: list[Any] = []

    def reconstruct(peer: bytes, body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        object_id = bytes.fromhex(replacement.hex())
        names = {"object_id": object_id, "owner": owner.worker_id, "status": b""}
        return {"state": RECONSTRUCTED, "reason": "", **names}

    owner.serve(protocol.RECONSTRUCT, reconstruct)
    consumer.results = ["the replacement"]
    assert consumer.recover([lost()], [borrowed]) == ["the replacement"]
    assert asked == [{"object_id": object_id(1), "key": KEY, "waiting_actor": ""}]


def test_all_processes_are_asked_if_the_owner_is_not_known(
    consumer: Consumer, owner: FakeSession, process: Callable[[int], FakeSession]
) -> None:
    another = process(5)
    answer(another, NOT_OWNER)
    answer(owner, REFUSED, "no retries")
    (error,) = consumer.recover([lost()], [ray.ObjectRef.nil()])
    assert "no retries" in str(error)


def test_an_object_without_an_owner_is_lost(consumer: Consumer, owner: FakeSession) -> None:
    answer(owner, NOT_OWNER)
    (error,) = consumer.recover([lost()], [None])
    assert "no process owns it" in str(error)


def test_an_owner_that_is_busy_is_asked_again(
    consumer: Consumer,
    owner: FakeSession,
    fake_ray: FakeRay,
    process: Callable[[int], FakeSession],
    clock: Clock,
) -> None:
    borrowed = fake_ray.create(1, rdt_value(KEY, 2), owner=owner.worker_id)
    session = consumer.recovery._session()
    session.silent[owner.address] = TimeoutError("no answer")  # type: ignore[attr-defined]
    answer(owner, REFUSED, "no retries")
    sleep = clock.sleep

    def wake(seconds: float) -> None:
        sleep(seconds)
        session.silent.clear()  # type: ignore[attr-defined]

    recovery.sleep = wake
    (error,) = consumer.recover([lost()], [borrowed])
    assert "no retries" in str(error)
    assert clock.slept == [0.005]


def test_an_owner_that_is_dead_is_not_asked_again(
    consumer: Consumer, owner: FakeSession, fake_ray: FakeRay, clock: Clock
) -> None:
    borrowed = fake_ray.create(1, rdt_value(KEY, 2), owner=owner.worker_id)
    session = consumer.recovery._session()
    session.silent[owner.address] = ConnectionError("gone")  # type: ignore[attr-defined]
    (error,) = consumer.recover([lost()], [borrowed])
    assert "one did not answer (gone)" in str(error)
    assert not clock.slept
