"""What every transport must do, whoever wrote it. A new one joins by a name in ``TRANSPORTS``."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import Any

import pytest
import torch
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

import ray
from tests.integration import user_transports
from tests.integration.conftest import needs_nixl
from tests.integration.peers import LARGE, SMALL, Peer, count_up, ones, total
from tests.support import wait_until

pytestmark = pytest.mark.usefixtures("users_transports")

#: Ours that run without a GPU; a user's in five lines; users' and fakes of RDT's own kind, all of
#: whose steps come late.
TRANSPORTS = ["auto", "gloo", pytest.param("nixl", marks=needs_nixl()), "files"]
LATE = ["shm", "pipe", "fake_reads", "fake_sends"]
STEPS = ("receive", "send", "expose", "read")


@pytest.fixture(params=[*TRANSPORTS, *LATE])
def name(request: pytest.FixtureRequest, producer: Any, consumer: Any, third: Any) -> Any:
    name = str(request.param)
    steps = dict.fromkeys(STEPS, "late") if name in LATE else {}
    everyone = [each.run.remote(play, steps) for each in (producer, consumer, third)]
    ray.get(everyone)
    play(None, steps)
    yield name
    play(None, {})
    ray.get([each.run.remote(play, {}) for each in (producer, consumer, third)])


def play(peer: Any, steps: dict[str, str]) -> None:
    user_transports.SCRIPT.clear()
    user_transports.SCRIPT.update(steps)


def make(actor: Any, transport: str, *args: Any) -> Any:
    return actor.make.options(tensor_transport=transport).remote(*args)


def kinds(peer: Any) -> dict[str, Any]:
    base = torch.arange(float(LARGE))
    return {
        "base": base,
        "view": base[10:30:3],
        "tied": base,
        "column": torch.arange(12).view(3, 4).t(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "halves": torch.ones(3, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "weight": torch.nn.Parameter(torch.ones(2)),
        "text": "no tensor",
    }


def many(peer: Any) -> list[torch.Tensor]:
    return [torch.full((16,), float(index)) for index in range(10_000)]


def keep(peer: Any, tensor: torch.Tensor) -> None:
    peer.kept["tensor"] = tensor


def total_of_kept(peer: Any) -> float:
    return total(peer, peer.kept["tensor"])


def stored(actor: Any) -> int:
    gc.collect()
    return int(ray.get(actor.stats.remote())["stored_objects"])


def test_values_arrive_as_they_were(producer: Any, name: str) -> None:
    received, sent = ray.get(make(producer, name, kinds)), kinds(None)
    assert received.pop("text") == sent.pop("text")
    for key, tensor in sent.items():
        assert torch.equal(received[key], tensor), key
        assert type(received[key]) is type(tensor), key
        assert received[key].dtype == tensor.dtype, key
        assert received[key].stride() == tensor.stride(), key
    assert received["tied"] is received["base"]
    received["base"][10] = -1
    assert received["view"][0] == -1


@pytest.mark.parametrize("count", [0, SMALL, LARGE])
def test_actor_to_actor(producer: Any, consumer: Any, name: str, count: int) -> None:
    assert ray.get(consumer.run.remote(total, make(producer, name, ones, count))) == count


def test_no_tensor_at_all(producer: Any, name: str) -> None:
    assert ray.get(make(producer, name, lambda peer: {"n": 1})) == {"n": 1}


def test_ten_thousand_tensors(producer: Any, name: str) -> None:
    received = ray.get(make(producer, name, many))
    assert [float(tensor[0]) for tensor in received] == list(range(10_000))


def test_a_put_of_the_drivers(consumer: Any, name: str) -> None:
    ref = ray.put(torch.ones(LARGE), _tensor_transport=name)
    assert ray.get(consumer.run.remote(total, ref)) == LARGE


def test_a_wrong_target_costs_nothing_but_itself(producer: Any, name: str) -> None:
    ref, target = make(producer, name, ones, LARGE), torch.zeros(LARGE)
    ray.experimental.set_target_for_ref(ref, [torch.zeros(LARGE + 1)])
    with pytest.raises(ValueError, match="target 0 has shape"):
        ray.get(ref)
    ray.experimental.set_target_for_ref(ref, [target])
    assert ray.get(ref) is target
    assert target.sum() == LARGE


def test_all_pairs_at_once(producer: Any, consumer: Any, third: Any, name: str) -> None:
    actors = [producer, consumer, third]
    counts = [LARGE + index for index in range(4)]
    pairs = [(one, two) for one in actors for two in actors if one is not two]
    sums = [
        two.run.remote(total, make(one, name, ones, count))
        for one, two in pairs
        for count in counts
    ]
    assert ray.get(sums, timeout=60) == counts * len(pairs)


def test_an_impatient_get_leaves_the_object_as_it_was(producer: Any, name: str) -> None:
    ref = make(producer, name, count_up, LARGE)
    ray.wait([ref], fetch_local=False)
    with pytest.raises(ray.exceptions.GetTimeoutError):
        ray.get([ref], timeout=0)
    assert torch.equal(ray.get(ref), count_up(None))  # type: ignore[arg-type]


def test_an_object_is_freed_once_by_whoever_is_last(
    producer: Any, consumer: Any, third: Any, name: str
) -> None:
    before = stored(producer)
    ref = make(producer, name, ones, LARGE)
    shared = [
        each.run.remote(lambda peer, refs: total(peer, *ray.get(refs)), [ref])
        for each in (consumer, third)
    ]
    del ref
    assert ray.get(shared) == [LARGE, LARGE]
    wait_until(lambda: stored(producer) <= before, "the object is freed")
    assert ray.get(consumer.run.remote(total, make(producer, name, ones, LARGE))) == LARGE


def test_deaths(producer: Any, consumer: Any, spawn: Any, name: str) -> None:
    maker, taker = spawn(Peer), spawn(Peer)
    kept = make(maker, name, ones, LARGE)
    ray.get(consumer.run.remote(keep, kept))
    before = stored(producer)

    # A consumer dies with pulls pending: its producer serves the others, and frees.
    pending = make(producer, name, ones, LARGE)
    lost = [taker.run.remote(total, pending) for _ in range(4)]
    ray.kill(taker)
    for each in lost:
        with suppress(RayActorError):
            assert ray.get(each, timeout=20) == LARGE
    assert ray.get(consumer.run.remote(total, pending), timeout=20) == LARGE
    del pending, lost
    wait_until(lambda: stored(producer) <= before, "what the dead one read is freed")

    # A producer dies under pulls: each gets all of it or an error, none waits.
    refs = [make(maker, name, ones, LARGE) for _ in range(4)]
    sums = [consumer.run.remote(total, ref) for ref in refs]
    ray.kill(maker)
    for each in sums:
        with suppress(ObjectLostError, RayActorError, RayTaskError):
            assert ray.get(each, timeout=20) == LARGE

    # It is dead before the pull, and the pull fails; after one, what was received stays.
    with pytest.raises((ObjectLostError, RayActorError)):
        ray.get(make(maker, name, ones, LARGE), timeout=20)
    assert ray.get(consumer.run.remote(total_of_kept)) == LARGE
    ray.get(consumer.run.remote(keep, torch.ones(1)))
    assert ray.get(consumer.run.remote(total, make(producer, name, ones, LARGE))) == LARGE
