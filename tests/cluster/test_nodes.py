"""Several Ray nodes on one machine: objects cross node borders, and nodes go away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import ObjectLostError

import ray
from ray.experimental.rdt.common import config
from tests.integration.peers import LARGE, SMALL, Peer, count_up, ones, total, total_of_refs
from tests.support import BUSY_S, KNOWN_WITHIN_S, ROOT, stopped, wait_until

pytestmark = pytest.mark.slow

NODE = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node, where the driver is, and two more, each with a resource of its name.

    What the GCS knows is on disk, so that another one can take over.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_gcs_storage", "rocksdb")
        patch.setenv("RAY_gcs_storage_path", str(tmp_path_factory.mktemp("gcs")))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        config.settings.cache_clear()
        nodes = Cluster(initialize_head=True, head_node_args={**NODE, "resources": {"head": 9}})
        for name in ("one", "two"):
            nodes.add_node(**NODE, resources={name: 9})
        ray.init(address=nodes.address, log_to_driver=False)
        nodes.wait_for_nodes()
        yield nodes
        ray.shutdown()
        nodes.shutdown()
    config.settings.cache_clear()


@pytest.fixture
def spawn_on(cluster: Cluster) -> Iterator[Callable[..., Any]]:
    """Makes an actor on the node of this name, for one test."""
    made = []

    def make(node: str, **options: Any) -> Any:
        made.append(Peer.options(resources={node: 1}, **options).remote())
        return made[-1]

    yield make
    for actor in made:
        ray.kill(actor)


def node_of(_: Peer) -> str:
    return str(ray.get_runtime_context().get_node_id())


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_objects_go_from_node_to_node(spawn_on: Any, transport: str) -> None:
    one, two, three = spawn_on("one"), spawn_on("two"), spawn_on("head")
    assert len({ray.get(peer.run.remote(node_of)) for peer in (one, two, three)}) == 3
    for count in (SMALL, LARGE):
        ref = one.make.options(tensor_transport=transport).remote(ones, count)
        used = [peer.run.remote(total, ref) for peer in (one, two, three)]
        assert ray.get(used) == [count] * 3
        assert torch.equal(ray.get(ref), torch.ones(count))


def test_put_on_another_node(spawn_on: Any) -> None:
    def put(_: Peer) -> list[Any]:
        return [ray.put(torch.ones(LARGE), _tensor_transport="auto")]

    one, two = spawn_on("one"), spawn_on("two")
    refs = ray.get(one.run.remote(put))
    assert ray.get(two.run.remote(total_of_refs, refs)) == LARGE
    assert ray.get(refs[0]).sum() == LARGE


def test_references_go_round_the_cluster(spawn_on: Any) -> None:
    one, two, three = spawn_on("one"), spawn_on("two"), spawn_on("head")
    ref = one.make.remote(count_up)
    for _ in range(3):
        for peer in (two, three, one):
            (ref,) = ray.get(peer.run.remote(lambda _, refs: refs, [ref]))
    assert ray.get(two.run.remote(total_of_refs, [ref])) == LARGE * (LARGE - 1) / 2
    del ref

    def assert_idle() -> None:
        for peer in (one, two, three):
            counters = ray.get(peer.stats.remote())
            assert (counters["stored_objects"], counters["directory_rows"]) == (0, 0)

    wait_until(assert_idle, "still in use:")


def test_value_with_much_plain_data_goes_through_the_object_store(spawn_on: Any) -> None:
    """Its skeleton is too large to ride in a call, so it comes by way of plasma on both nodes."""

    def make(_: Peer) -> dict[str, Any]:
        return {"t": torch.ones(LARGE), "plain": bytes(2 << 20)}

    def check(peer: Peer, value: dict[str, Any]) -> bool:
        return value["plain"] == bytes(2 << 20) and total(peer, value["t"]) == LARGE

    one, two = spawn_on("one"), spawn_on("two")
    ref = one.make.remote(make)
    assert ray.get(two.run.remote(check, ref))
    assert ray.get(two.run.remote(lambda peer, refs: check(peer, ray.get(refs[0])), [ref]))


def test_tasks_on_other_nodes_take_objects(spawn_on: Any) -> None:
    @ray.remote(num_cpus=0)
    def total_in_task(tensor: torch.Tensor) -> float:
        return float(tensor.sum())

    ref = spawn_on("one").make.remote(ones)
    used = [total_in_task.options(resources={node: 1}).remote(ref) for node in ("two", "head")]
    assert ray.get(used) == [LARGE, LARGE]


def test_removed_node_loses_its_objects_and_no_others(cluster: Cluster, spawn_on: Any) -> None:
    node = cluster.add_node(**NODE, resources={"short-lived": 9})
    doomed = Peer.options(resources={"short-lived": 1}).remote()
    stays, taker = spawn_on("one"), spawn_on("two")
    lost, kept = doomed.make.remote(ones), stays.make.remote(ones)
    assert ray.get(taker.run.remote(total_of_refs, [lost, kept])) == 2 * LARGE
    pid = ray.get(doomed.pid.remote())
    cluster.remove_node(node, allow_graceful=False)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the node's worker has ended")
    began = time.monotonic()
    with pytest.raises(ObjectLostError):
        ray.get(lost, timeout=60)
    assert time.monotonic() - began < KNOWN_WITHIN_S + BUSY_S
    with pytest.raises(ObjectLostError):
        ray.get(taker.run.remote(total_of_refs, [lost]), timeout=60)
    assert ray.get(taker.run.remote(total_of_refs, [kept])) == LARGE


def test_objects_of_a_dead_node_are_made_again_on_another(cluster: Cluster) -> None:
    """Once Ray counts the node as dead; its workers' ends are told to nobody."""
    place = {"movable": 1}
    node = cluster.add_node(**NODE, resources=place)
    maker = Peer.options(resources=place, max_restarts=1, max_task_retries=1).remote()
    ref = maker.make.remote(ones)
    ray.wait([ref], fetch_local=False)
    cluster.remove_node(node, allow_graceful=False)
    other = cluster.add_node(**NODE, resources=place)
    assert float(ray.get(ref, timeout=100).sum()) == LARGE
    ray.kill(maker)
    cluster.remove_node(other)


def test_killed_raylet_takes_its_workers_and_no_others(cluster: Cluster, spawn_on: Any) -> None:
    node = cluster.add_node(**NODE, resources={"headless": 9})
    doomed = Peer.options(resources={"headless": 1}).remote()
    stays, taker = spawn_on("one"), spawn_on("two")
    lost, kept = doomed.make.remote(ones), stays.make.remote(ones)
    assert ray.get(taker.run.remote(total_of_refs, [lost, kept])) == 2 * LARGE
    pid = ray.get(doomed.pid.remote())
    node.kill_raylet()
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "Ray ends the worker", limit_s=60)
    began = time.monotonic()
    with pytest.raises(ObjectLostError):
        ray.get(lost, timeout=60)
    assert time.monotonic() - began < KNOWN_WITHIN_S + BUSY_S
    assert ray.get(taker.run.remote(total_of_refs, [kept])) == LARGE
    cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def gcs(cluster: Cluster) -> int:
    """The pid of the GCS."""
    (entry,) = cluster.head_node.all_processes["gcs_server"]
    return int(entry.process.pid)


def test_stopped_gcs_stops_no_transfer(gcs: int, spawn_on: Any) -> None:
    """Who has used RDT before needs no GCS; who is new waits until it is back."""
    one, two = spawn_on("one"), spawn_on("two")
    assert ray.get(two.run.remote(total_of_refs, [one.make.remote(ones)])) == LARGE
    new = spawn_on("head")
    ray.get(new.pid.remote())
    with stopped(gcs):
        for _ in range(3):
            assert ray.get(two.run.remote(total_of_refs, [one.make.remote(ones)])) == LARGE
        assert ray.get(one.make.remote(ones)).sum() == LARGE
        late = new.run.remote(total_of_refs, [one.make.remote(ones)])
        assert not ray.wait([late], timeout=1)[0]
    assert ray.get(late, timeout=60) == LARGE

    def assert_idle() -> None:
        assert ray.get(one.stats.remote())["stored_objects"] == 0

    wait_until(assert_idle, "still in use:")


def test_killed_gcs_that_is_started_again_stops_no_transfer(
    cluster: Cluster, spawn_on: Any
) -> None:
    """While it is away as while it is stopped; the new one serves as the old one did."""

    def own(peer: Peer, to: Any) -> None:
        peer.kept["own"] = to.make.remote(ones)
        ray.wait([peer.kept["own"]])

    def assert_stored(count: int) -> None:
        assert ray.get(one.stats.remote())["stored_objects"] == count

    one, two = spawn_on("one"), spawn_on("two")
    assert ray.get(two.run.remote(total_of_refs, [one.make.remote(ones)])) == LARGE
    new, owner = spawn_on("head"), spawn_on("two")
    ray.get([new.pid.remote(), owner.run.remote(own, one)])
    cluster.head_node.kill_gcs_server()
    assert ray.get(two.run.remote(total_of_refs, [one.make.remote(ones)])) == LARGE
    late = new.run.remote(total_of_refs, [one.make.remote(ones)])
    assert not ray.wait([late], timeout=1)[0]
    cluster.head_node.start_gcs_server()
    assert ray.get(late, timeout=60) == LARGE
    assert ray.get(spawn_on("head").run.remote(total_of_refs, [one.make.remote(ones)])) == LARGE
    wait_until(lambda: assert_stored(1), "what is in use, and no more:")
    os.kill(ray.get(owner.pid.remote()), signal.SIGKILL)
    wait_until(lambda: assert_stored(0), "the dead owner's object:")
