"""Objects with the transport "auto" over nixl, as between hosts that have RDMA devices.

There are none here. The consumer is made to believe in both, and nixl is the real one.
"""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import RayTaskError

import ray
from ray.experimental.rdt import explain
from ray.experimental.rdt.transports import selection
from ray.experimental.rdt.transports.nixl import engine as nixl_engine
from ray.experimental.rdt.transports.nixl.endpoint import Endpoint
from tests.integration.peers import LARGE, Peer, count_up, ones, pulls, total
from tests.support import needs_nixl

pytestmark = needs_nixl()


def go_far(_: Peer) -> None:
    """This process's host has RDMA devices, and every other process is on another."""
    selection._has_rdma = lambda: True
    selection.boot_id_of = lambda address: address[6:22]


@pytest.fixture
def far(spawn: Any) -> Any:
    actor = spawn()
    ray.get(actor.run.remote(go_far))
    return actor


def by_nixl(_: Peer) -> int:
    """How many exposures of other processes this one has read."""
    transport = ray._private.worker.global_worker.rdt_manager.transport("nixl")
    endpoint = transport._endpoint
    known = endpoint._remotes._known.values() if endpoint is not None else ()
    return sum(len(remote.exposures) for remote in known)


def way(consumer: Any, producer: Any) -> Any:
    told = explain((producer, consumer))
    (nixl,) = [each for each in told.ways["cpu"] if each.name == "nixl"]
    return told.used(), nixl.reason


def test_nixl_is_taken_between_hosts_with_rdma(producer: Any, far: Any) -> None:
    before = pulls(far)
    assert ray.get(far.run.remote(total, producer.make.remote(count_up))) == sum(range(LARGE))
    assert ray.get(far.run.remote(by_nixl)) == 1
    assert pulls(far) == before
    assert way(far, producer)[0] == "nixl"


def test_on_one_host_it_is_not(producer: Any, consumer: Any) -> None:
    used, reason = way(consumer, producer)
    assert used == "cma"
    assert "on one host" in reason


def test_a_producer_without_the_library_is_asked_once(spawn: Any, far: Any) -> None:
    def remove(_: Peer) -> None:
        def missing() -> None:
            raise nixl_engine.NixlMissing("the nixl library is missing in this process")

        nixl_engine.check_installed = missing

    producer = spawn()
    ray.get(producer.run.remote(remove))
    assert "at the producer" in way(far, producer)[1]
    for _ in range(2):
        assert ray.get(far.run.remote(total, producer.make.remote(ones))) == LARGE
    assert pulls(far)["cma"] == 2
    used, reason = way(far, producer)
    assert used == "cma"
    assert "it failed within the last minute" in reason


def fail_to_read(_: Peer, code: str, may_still_write: bool) -> None:
    def read(self: Endpoint, *_: Any) -> None:
        raise nixl_engine.NixlError("the cable is out", code, may_still_write=may_still_write)

    Endpoint.read = read  # type: ignore[method-assign]


def test_a_read_that_fails_goes_over_the_lanes(producer: Any, far: Any) -> None:
    ray.get(far.run.remote(fail_to_read, "peer_lost", False))
    for _ in range(2):
        assert ray.get(far.run.remote(total, producer.make.remote(ones))) == LARGE
    assert pulls(far)["cma"] == 2


@pytest.mark.parametrize(("code", "may_still_write"), [("", True), ("not_found", False)])
def test_what_another_lane_must_not_or_cannot_mend(
    producer: Any, far: Any, code: str, may_still_write: bool
) -> None:
    """Memory that is still written to, and an object that is gone."""
    ray.get(far.run.remote(fail_to_read, code, may_still_write))
    with pytest.raises(RayTaskError):
        ray.get(far.run.remote(total, producer.make.remote(ones)))


def test_the_setting_forbids_it(producer: Any, spawn: Any) -> None:
    lanes = {"RAY_RDT_LANES": "inproc,cma,shm,tcp"}
    actor = spawn(runtime_env={"env_vars": lanes})
    ray.get(actor.run.remote(go_far))
    used, reason = way(actor, producer)
    assert used == "cma"
    assert "RAY_RDT_LANES" in reason
