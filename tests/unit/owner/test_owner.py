"""The owner: what it tells producers and consumers, without a cluster."""

from __future__ import annotations

import warnings
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from ray.experimental.rdt.common.descriptor import Location
from ray.experimental.rdt.owner.owner import Owner
from tests.unit.fakes import FakeRay, address, object_id

NBYTES = 1 << 20
PRODUCER, CONSUMER = b"p" * 16, b"c" * 16
THERE = Location(address(2), b"k" * 16, NBYTES, (NBYTES,))
SMALL = Location(address(2), b"s" * 16, 8)


class Process:
    """An owner and the services of its session.

    Attributes:
        told: What its agent told producers: the operation and the key.
        hinted: The actors that were hinted, and the keys.
        background: The actions that run on another thread.
        has_session: Whether a session has begun.
    """

    def __init__(self) -> None:
        self.told: list[tuple[str, bytes]] = []
        self.hinted: list[tuple[bytes, bytes]] = []
        self.background: list[Any] = []
        self.has_session = True
        agent = SimpleNamespace(
            free=lambda address, key: self.told.append(("free", key)),
            own=lambda address, key: self.told.append(("own", key)),
        )
        hints = SimpleNamespace(
            send=lambda actor, location: self.hinted.append((actor, location.key))
        )
        session = SimpleNamespace(agent=agent, run_in_background=self.background.append)
        services: Any = SimpleNamespace(session=session, hints=hints, streams=None)
        self.owner = Owner(lambda: services, lambda: services if self.has_session else None)


class Actor:
    """A handle."""

    def __init__(self, actor_id: bytes):
        self._actor_id = SimpleNamespace(binary=lambda: actor_id)


@pytest.fixture
def process(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> Process:
    monkeypatch.setattr(
        "ray.experimental.rdt.transports.user.registered.refresh", lambda name: None
    )
    return Process()


@pytest.fixture
def ref(fake_ray: FakeRay) -> Any:
    return fake_ray.ref(object_id(1))


def submit(process: Process, ref: Any, actor: Actor | None = None) -> Any:
    return process.owner.submit(lambda args, kwargs: ref, [], {}, actor or Actor(PRODUCER), "AUTO")


def test_a_created_object_is_claimed_and_freed_after_its_last_reference(
    process: Process, ref: Any
) -> None:
    assert submit(process, ref) is ref
    process.owner.created(ref.hex(), THERE)
    assert process.told == [("own", THERE.key)]
    assert process.owner.row(ref.hex()) is not None
    process.owner.out_of_scope(ref.hex())
    assert process.told[1:] == [("free", THERE.key)]
    assert process.owner.row(ref.hex()) is None


def test_a_small_object_is_claimed_at_the_next_tick_if_it_still_lives(
    process: Process, ref: Any, fake_ray: FakeRay
) -> None:
    gone = fake_ray.ref(object_id(2))
    for each, location in ((ref, SMALL), (gone, Location(address(2), b"g" * 16, 8))):
        submit(process, each)
        process.owner.created(each.hex(), location)
    process.owner.out_of_scope(gone.hex())
    assert ("own", SMALL.key) not in process.told
    process.owner.on_tick()
    assert process.told == [("free", b"g" * 16), ("own", SMALL.key)]


def test_a_reply_before_the_reference_belongs_to_its_call(process: Process, ref: Any) -> None:
    def invoke(args: Any, kwargs: Any) -> Any:
        process.owner.created(ref.hex(), THERE)
        return ref

    process.owner.submit(invoke, [], {}, Actor(PRODUCER), "AUTO")
    assert process.told == [("own", THERE.key)]


def test_an_early_reply_of_a_call_that_failed_is_freed(process: Process, ref: Any) -> None:
    def invoke(args: Any, kwargs: Any) -> Any:
        process.owner.created(ref.hex(), THERE)
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        process.owner.submit(invoke, [], {}, Actor(PRODUCER), "AUTO")
    assert process.told[-1] == ("free", THERE.key)


def test_actors_that_get_the_object_are_hinted(process: Process, ref: Any) -> None:
    submit(process, ref)
    process.owner.note_arguments(Actor(CONSUMER), [1, ref])
    assert not process.hinted
    process.owner.created(ref.hex(), THERE)
    assert process.hinted == [(CONSUMER, THERE.key)]


def test_an_object_that_its_producer_shares_warns_once(process: Process, ref: Any) -> None:
    submit(process, ref)
    process.owner.note_arguments(Actor(CONSUMER), [ref])
    with pytest.warns(UserWarning, match="has been passed to its producer") as caught:
        process.owner.note_arguments(Actor(PRODUCER), [ref])
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        process.owner.note_arguments(Actor(PRODUCER), [ref])


def test_a_handle_is_released_on_another_thread_when_the_object_is_gone(
    process: Process, ref: Any
) -> None:
    actor = Actor(PRODUCER)
    handle = weakref.ref(actor)
    submit(process, ref, actor)
    del actor
    process.owner.created(ref.hex(), THERE)
    process.owner.out_of_scope(ref.hex())
    assert handle() is not None
    (release,) = process.background
    release()
    assert handle() is None


def test_without_a_session_nothing_is_told(process: Process, ref: Any) -> None:
    submit(process, ref)
    process.has_session = False
    process.owner.created(ref.hex(), THERE)
    process.owner.out_of_scope(ref.hex())
    process.owner.on_tick()
    assert not process.told


def test_a_put_and_an_adopted_item_are_owned(process: Process, ref: Any, fake_ray: FakeRay) -> None:
    process.owner.record_put(object_id(5), "auto", THERE)
    assert process.owner.may_own(object_id(5), THERE.key)
    assert process.owner.find(THERE.key) == object_id(5)
    item: Any = SimpleNamespace(address=address(2), key=b"i" * 16, nbytes=8, transport="auto")
    process.owner.adopt(ref, item, None)
    assert process.told == [("own", b"i" * 16)]
    assert process.owner.stats()["directory_rows"] == 2


def test_close_frees_all_objects(process: Process, ref: Any) -> None:
    submit(process, ref)
    process.owner.created(ref.hex(), THERE)
    process.owner.close()
    assert process.told[-1] == ("free", THERE.key)
    assert process.owner.stats()["directory_rows"] == 0
