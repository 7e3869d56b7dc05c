"""What becomes of a late value whose pull, or whose callback, raises what is no Exception."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest

import ray
from ray.experimental.rdt.consumer.deferred import Puller

PRODUCER = b"a producer"


def test_a_value_that_exits_while_it_is_unpickled_is_an_error() -> None:
    def deserialize(_: Any) -> Any:
        raise SystemExit(3)

    puller = Puller()
    future = puller.defer(deserialize, PRODUCER).start()
    assert isinstance(future.result(20), ray.exceptions.RaySystemError)
    puller.close()


def test_callbacks_that_raise_leave_their_turn() -> None:
    def leave(_: Any) -> None:
        raise SystemExit(3)

    puller = Puller()
    for _ in range(20):
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        late = puller.defer(lambda _: 7, PRODUCER)
        late.then(done.set_result)
        late.then(leave)
        assert done.result(20) == 7
    puller.close()


@pytest.mark.parametrize("kind", [ValueError, TimeoutError])
def test_other_errors_are_given_as_those_of_ray_get(kind: type[Exception]) -> None:
    def deserialize(_: Any) -> Any:
        raise kind("on purpose")

    puller = Puller()
    error = puller.defer(deserialize, PRODUCER).start().result(20)
    assert isinstance(error, ray.exceptions.RayTaskError)
    assert isinstance(error.as_instanceof_cause(), kind)
    puller.close()
