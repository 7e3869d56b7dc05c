"""What RDT makes of a transport of its own kind whose steps fail, on either side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError

import ray
from ray.experimental.rdt.common.errors import RDTError, RDTFetchError
from ray.experimental.rdt.transports import selection
from tests.integration import user_transports
from tests.integration.peers import FAKES, LARGE, Peer, ones, pulls, total
from tests.support import wait_until

ONE_SIDED, TWO_SIDED = (each.capabilities.name for each in FAKES)

#: For each step the transport and the side that it runs on.
STEPS = {
    "expose": (ONE_SIDED, "producer"),
    "read": (ONE_SIDED, "consumer"),
    "send": (TWO_SIDED, "producer"),
    "receive": (TWO_SIDED, "consumer"),
}


@pytest.fixture(scope="module")
def lenient(local_ray: None) -> Iterator[Any]:
    """A consumer that may take another lane than the named transport."""
    environment = {"env_vars": {"RAY_RDT_STRICT_TRANSPORT": "0"}}
    actor = Peer.options(runtime_env=environment).remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(scope="module")
def chooser(local_ray: None) -> Iterator[Any]:
    """A consumer that is told what to prefer."""
    actor = Peer.remote()
    yield actor
    ray.kill(actor)


@pytest.fixture(autouse=True)
def nothing_goes_wrong(producer: Any, consumer: Any, lenient: Any, chooser: Any) -> Iterator[None]:
    """Before the test as well: a process knows the fakes once it has imported this module."""
    ray.get([each.run.remote(script) for each in (producer, consumer, lenient, chooser)])
    yield
    ray.get([each.run.remote(script) for each in (producer, consumer, lenient, chooser)])


def script(_: Any, **steps: str) -> None:
    user_transports.SCRIPT.clear()
    user_transports.SCRIPT.update(steps)


def make(actor: Any, transport: str) -> Any:
    return actor.make.options(tensor_transport=transport).remote(ones)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_is_the_waiters_error_and_the_next_works(
    producer: Any, consumer: Any, step: str
) -> None:
    name, side = STEPS[step]
    ref = make(producer, name)
    ray.get((producer if side == "producer" else consumer).run.remote(script, **{step: "raise"}))
    with pytest.raises(RayTaskError) as raised:
        ray.get(consumer.run.remote(total, ref), timeout=30)
    assert isinstance(raised.value.cause, RDTFetchError), raised.value
    assert name in str(raised.value)
    if step != "send":  # the sender's reason stays in its log
        assert f"scripted to fail in {step}" in str(raised.value)
    ray.get([each.run.remote(script) for each in (producer, consumer)])
    assert ray.get(consumer.run.remote(total, ref), timeout=30) == LARGE


def prefer(_: Any, *names: str) -> None:
    """This process tries the agent's lanes, for what nobody named, only after these."""
    selection._HOST_TRANSPORTS = names


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("what", ["raise", "unavailable"])
def test_a_step_of_a_transport_that_nobody_named(
    producer: Any, chooser: Any, step: str, what: str
) -> None:
    """The next candidate is tried: first the other fake, then the agent's lanes."""
    name, side = STEPS[step]
    other = ONE_SIDED if name == TWO_SIDED else TWO_SIDED
    before = sum(pulls(chooser).values())
    ray.get(chooser.run.remote(prefer, name, other))
    broken = producer if side == "producer" else chooser
    ray.get(broken.run.remote(script, **{step: what}))
    assert ray.get(chooser.run.remote(total, make(producer, "auto")), timeout=30) == LARGE
    assert sum(pulls(chooser).values()) == before
    ray.get(chooser.run.remote(prefer, name))
    assert ray.get(chooser.run.remote(total, make(producer, "auto")), timeout=30) == LARGE
    assert sum(pulls(chooser).values()) == before + 1


@pytest.mark.parametrize("step", ["expose", "read", "receive"])
def test_a_step_that_cannot_serve_is_an_error_or_another_lane(
    producer: Any, consumer: Any, lenient: Any, step: str
) -> None:
    name, side = STEPS[step]
    ref = make(producer, name)
    for each in {"producer": [producer], "consumer": [consumer, lenient]}[side]:
        ray.get(each.run.remote(script, **{step: "unavailable"}))
    with pytest.raises(RayTaskError) as raised:
        ray.get(consumer.run.remote(total, ref), timeout=30)
    assert isinstance(raised.value.cause, (RDTError, RDTFetchError))
    assert "RAY_RDT_STRICT_TRANSPORT" in str(raised.value)
    before = sum(pulls(lenient).values())
    assert ray.get(lenient.run.remote(total, ref), timeout=30) == LARGE
    assert sum(pulls(lenient).values()) == before + 1


def test_a_stale_route_is_tried_once_more(producer: Any, consumer: Any) -> None:
    ray.get(consumer.run.remote(script, receive="stale"))
    assert ray.get(consumer.run.remote(total, make(producer, TWO_SIDED)), timeout=30) == LARGE


@pytest.mark.usefixtures("users_transports")
def test_a_users_transport_falls_back_to_the_agents_lanes(producer: Any, lenient: Any) -> None:
    """Where the consumer says that it has not got it."""
    ref = make(producer, "shm")
    ray.get(lenient.run.remote(script, has="no"))
    before = sum(pulls(lenient).values())
    assert ray.get(lenient.run.remote(total, ref), timeout=30) == LARGE
    assert sum(pulls(lenient).values()) == before + 1
    ray.get(lenient.run.remote(script))
    assert ray.get(lenient.run.remote(total, ref), timeout=30) == LARGE
    assert sum(pulls(lenient).values()) == before + 1


def test_what_failed_is_freed(producer: Any, consumer: Any) -> None:
    def is_freed() -> bool:
        ray.get(consumer.stats.remote())  # collects what the failed calls have left in cycles
        return bool(ray.get(producer.stats.remote())["stored_objects"] <= before)

    before = ray.get(producer.stats.remote())["stored_objects"]
    for step, (name, side) in STEPS.items():
        ref = make(producer, name)
        ray.get(
            (producer if side == "producer" else consumer).run.remote(script, **{step: "raise"})
        )
        with pytest.raises(RayTaskError):
            ray.get(consumer.run.remote(total, ref), timeout=30)
        del ref
        wait_until(is_freed, f"what failed in {step} is freed", limit_s=10)


def test_targets(producer: Any) -> None:
    for name in (ONE_SIDED, TWO_SIDED):
        ref, target = make(producer, name), torch.zeros(2 * LARGE)[::2]
        ray.experimental.set_target_for_ref(ref, [target])
        assert ray.get(ref) is target
        assert target.sum() == LARGE
