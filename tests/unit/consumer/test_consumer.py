"""The consumer: which values are fetched, deferred or left to Ray, without a cluster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray._private import ray_constants
from ray.exceptions import RayTaskError

from ray.experimental.rdt.common.descriptor import Descriptor, encode
from ray.experimental.rdt.consumer import consumer as module
from ray.experimental.rdt.consumer.consumer import Consumer
from ray.experimental.rdt.consumer.deferred import Deferred
from ray.experimental.rdt.consumer.fetcher import FetchedValue, Request
from ray.experimental.rdt.producer.tensor_store import TensorStore
from ray.experimental.rdt.serialization import layout
from ray.experimental.rdt.serialization.envelope import Envelope
from tests.unit.fakes import FakeRay, address, object_id

PLAIN = (b"", ray_constants.OBJECT_METADATA_TYPE_PYTHON, None)


class Process:
    """A consumer whose fetcher records requests and returns ones."""

    def __init__(self) -> None:
        self.store = TensorStore()
        self.fetched: list[list[Request]] = []
        fetcher: Any = SimpleNamespace(fetch=self._fetch)
        recovery: Any = SimpleNamespace(
            replace_lost=lambda requests, results, began, timeout_s: results
        )
        self.consumer = Consumer(self.store, fetcher, recovery)

    def _fetch(self, requests: list[Request], timeout_s: float | None) -> list[FetchedValue]:
        if requests:
            self.fetched.append(requests)
        return [FetchedValue(request.envelope, [torch.ones(2)]) for request in requests]


def value_of(number: int, is_eager: bool = False) -> Any:
    """A serialized RDT value, as the core returns it."""
    key = bytes([number]) * 16
    return key, encode(Descriptor(key, 8, bytes(16), "auto", address(2), is_eager)), None


@pytest.fixture
def process(fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch) -> Process:
    table = layout.lay_out([torch.ones(2)]).table

    def open_envelope(metadata: bytes, data: Any) -> Any:
        head: Any = SimpleNamespace(key=data)
        return Envelope(head, b"", table, None, [])

    monkeypatch.setattr(module, "open_envelope", open_envelope)
    return Process()


def refs_of(fake_ray: FakeRay, *numbers: int) -> list[Any]:
    return [fake_ray.ref(object_id(number)) for number in numbers]


def test_only_rdt_values_are_fetched(process: Process, fake_ray: FakeRay) -> None:
    refs = refs_of(fake_ray, 1, 2)
    results = process.consumer.fetch([PLAIN, value_of(2)], refs)
    assert list(results) == [1]
    ((request,),) = process.fetched
    assert request.object_id == object_id(2)


def test_an_object_that_is_in_a_batch_twice_is_fetched_once(
    process: Process, fake_ray: FakeRay
) -> None:
    results = process.consumer.fetch([value_of(1), value_of(1)], refs_of(fake_ray, 1, 1))
    assert results[0] is results[1]
    assert len(process.fetched[0]) == 1


def test_a_place_with_targets_of_its_own_has_a_request_of_its_own(
    process: Process, fake_ray: FakeRay
) -> None:
    target = torch.empty(2)
    process.consumer.fetch([value_of(1), value_of(1)], refs_of(fake_ray, 1, 1), into={1: [target]})
    anywhere, directed = process.fetched[0]
    assert anywhere.target.tensors is None
    assert directed.target.tensors == [target]


def test_a_target_for_a_plain_value_is_an_error(process: Process, fake_ray: FakeRay) -> None:
    process.consumer.targets.set_tensors(object_id(1), [torch.empty(2)])
    with pytest.raises(ValueError, match="not an RDT object"):
        process.consumer.fetch([PLAIN], refs_of(fake_ray, 1))


def test_without_torch_the_value_is_an_error(
    process: Process, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_envelope(metadata: bytes, data: Any) -> Any:
        raise ImportError("no torch", name="torch")

    monkeypatch.setattr(module, "open_envelope", open_envelope)
    error: Any = process.consumer.fetch([value_of(1)], refs_of(fake_ray, 1))[0]
    assert "torch" in str(error)


def test_a_thread_that_must_not_block_defers_what_has_to_move(
    process: Process, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "must_not_block", lambda: True)
    values = [value_of(1), value_of(2, is_eager=True), PLAIN]
    results = process.consumer.fetch_or_defer(values, refs_of(fake_ray, 1, 2, 3))
    assert isinstance(results[0], Deferred)
    assert isinstance(results[1], FetchedValue)
    assert 2 not in results
    assert [request.object_id for batch in process.fetched for request in batch] == [object_id(2)]
    process.consumer.close()


def test_a_deferred_value_is_fetched_when_it_starts(
    process: Process, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "must_not_block", lambda: True)
    late: Any = process.consumer.fetch_or_defer([value_of(1)], refs_of(fake_ray, 1))[0]
    assert not process.fetched
    assert late.result() == value_of(1)[0]
    assert len(process.fetched) == 1
    process.consumer.close()


def test_a_target_that_does_not_fit_becomes_the_value_where_nothing_may_be_raised(
    process: Process, fake_ray: FakeRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "must_not_block", lambda: True)
    process.consumer.targets.set_tensors(object_id(2), [torch.empty(5)])
    results = process.consumer.fetch_or_defer([value_of(2, is_eager=True)], refs_of(fake_ray, 2))
    assert isinstance(results[0], RayTaskError)
