"""RAY_RDT_CHECKSUM=1: right bytes arrive as ever, wrong ones do not pass."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

import ray
from tests.integration import user_transports
from tests.integration.peers import (
    LANE_SETTINGS,
    LANES,
    LARGE,
    Peer,
    count_up,
    ones,
    pulls,
    total,
)
from tests.support import needs_nixl, wait_until

pytestmark = pytest.mark.usefixtures("users_transports")


@pytest.fixture(scope="module")
def careful(local_ray: None) -> Any:
    """Actors that verify what they pull, one for each set of lanes, strict or not."""
    made: dict[tuple[str, str], Any] = {}

    def get(lanes: str = "cma,shm,tcp", strict: str = "1") -> Any:
        if (lanes, strict) not in made:
            environment = {
                "RAY_RDT_CHECKSUM": "1",
                "RAY_RDT_LANES": LANE_SETTINGS.get(lanes, lanes),
                "RAY_RDT_STRICT_TRANSPORT": strict,
            }
            made[lanes, strict] = Peer.options(runtime_env={"env_vars": environment}).remote()
        return made[lanes, strict]

    yield get
    for actor in made.values():
        ray.kill(actor)


def many(peer: Peer) -> list[torch.Tensor]:
    """A large tensor, a view, many small ones and an empty one."""
    torch.manual_seed(3)
    large = torch.rand(3 << 20)
    return [large, large[5:9], *(torch.rand(i % 97) for i in range(2000)), torch.empty(0)]


def is_many(peer: Peer, got: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, many(peer), strict=True))


@pytest.mark.parametrize("lane", LANES)
def test_right_bytes_arrive_over_each_lane(producer: Any, careful: Any, lane: str) -> None:
    ref = producer.make.remote(many)
    assert ray.get([careful(lane).run.remote(is_many, ref) for _ in range(2)]) == [True, True]
    assert pulls(careful(lane))[lane] >= 2


@pytest.mark.parametrize("name", ["gloo", pytest.param("nixl", marks=needs_nixl()), "shm"])
def test_right_bytes_arrive_over_each_transport(producer: Any, careful: Any, name: str) -> None:
    ref = producer.make.options(tensor_transport=name).remote(many)
    assert ray.get(careful().run.remote(is_many, ref))


@pytest.mark.parametrize("lane", LANES)
def test_bytes_that_changed_do_not_pass(producer: Any, careful: Any, lane: str) -> None:
    def keep(peer: Peer) -> torch.Tensor:
        peer.kept["tensor"] = torch.ones(LARGE)
        return peer.kept["tensor"]

    def get_error(peer: Peer, refs: list[Any]) -> str:
        from ray.experimental.rdt.common.errors import RDTChecksumError, RDTFetchError

        with pytest.raises(RDTFetchError) as caught:
            ray.get(refs[0])
        assert type(pickle.loads(pickle.dumps(caught.value))) is RDTChecksumError
        return str(caught.value)

    ref = producer.make.remote(keep)
    assert ray.get(careful(lane).run.remote(total, ref)) == LARGE
    ray.get(producer.run.remote(lambda peer: peer.kept.pop("tensor")[7].add_(1)))
    said = ray.get(careful(lane).run.remote(get_error, [ref]))
    producer_id = producer._actor_id.hex()
    assert all(part in said for part in (ref.hex(), producer_id, f"over {lane}", "checksum"))


def test_bytes_that_change_before_the_first_pull_are_the_producers(
    producer: Any, careful: Any
) -> None:
    def keep(peer: Peer) -> torch.Tensor:
        peer.kept["tensor"] = torch.ones(LARGE)
        return peer.kept["tensor"]

    ref = producer.make.remote(keep)
    ray.wait([ref])
    ray.get(producer.run.remote(lambda peer: peer.kept.pop("tensor")[7].add_(1)))
    assert ray.get(careful().run.remote(total, ref)) == LARGE + 1


def test_who_does_not_verify_gets_what_is_there(producer: Any, consumer: Any, careful: Any) -> None:
    def keep(peer: Peer) -> torch.Tensor:
        peer.kept["tensor"] = torch.ones(LARGE)
        return peer.kept["tensor"]

    ref = producer.make.remote(keep)
    assert ray.get(careful().run.remote(total, ref)) == LARGE
    ray.get(producer.run.remote(lambda peer: peer.kept.pop("tensor")[7].add_(1)))
    assert ray.get(consumer.run.remote(total, ref)) == LARGE + 1


def spoil(peer: Peer) -> None:
    user_transports.SCRIPT["receive"] = "spoil"


def test_wrong_bytes_of_a_transport_come_again_over_a_lane(producer: Any, careful: Any) -> None:
    taker = careful("cma,shm,tcp", "0")
    ray.get(taker.run.remote(spoil))
    before = sum(pulls(taker).values())
    ref = producer.make.options(tensor_transport="shm").remote(count_up)
    assert ray.get(taker.run.remote(total, ref)) == LARGE * (LARGE - 1) / 2
    assert sum(pulls(taker).values()) == before + 1


def test_wrong_bytes_of_a_transport_are_an_error_if_it_must_be_that(
    producer: Any, careful: Any
) -> None:
    taker = careful()
    ray.get(taker.run.remote(spoil))
    ref = producer.make.options(tensor_transport="shm").remote(count_up)
    with pytest.raises(ray.exceptions.RayError, match=r"over shm.*checksum"):
        ray.get(taker.run.remote(total, ref))


def test_hinted_objects_are_verified(producer: Any, careful: Any) -> None:
    taker = careful()
    refs = [producer.make.remote(ones, 4 * LARGE) for _ in range(4)]
    assert ray.get([taker.run.remote(total, ref) for ref in refs]) == [4 * LARGE] * 4
    wait_until(lambda: ray.get(taker.stats.remote())["hinted_bytes"] == 0, "nothing hinted is left")
