"""Nothing is kept longer than its references, and nothing is let go before."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ray
from ray.experimental import wait_tensor_freed
from tests.integration.peers import LARGE, SMALL, Peer, ones, total, total_of_refs
from tests.support import run_driver, wait_until

#: What must be zero in every process once nothing is in use; the agent's names and ours.
IN_USE = ("stored_objects", "directory_rows", "regions", "pinned", "pool_used")


@pytest.fixture(scope="module")
def maker(local_ray: None) -> Any:
    return Peer.remote()


@pytest.fixture(scope="module")
def taker(local_ray: None) -> Any:
    return Peer.remote()


def in_use(counters: dict[str, int]) -> dict[str, int]:
    return {name: counters[name] for name in IN_USE if counters.get(name)}


@pytest.fixture
def settled(maker: Any, taker: Any) -> Callable[[], None]:
    """Waits until no process of the test uses anything; checked before the test as well."""

    def wait() -> None:
        def assert_idle() -> None:
            gc.collect()
            assert in_use(ray.experimental.rdt.stats()) == {}
            assert in_use(ray.get(maker.stats.remote())) == {}
            assert in_use(ray.get(taker.stats.remote())) == {}

        wait_until(assert_idle, "still in use:")

    wait()
    return wait


@pytest.mark.parametrize("count", [SMALL, LARGE], ids=["small", "large"])
def test_counters_return_to_the_start(
    maker: Any, taker: Any, settled: Callable[[], None], transport: str, count: int
) -> None:
    make = maker.make.options(tensor_transport=transport)
    for _ in range(3):
        refs = [make.remote(ones, count) for _ in range(20)]
        results = [taker.run.remote(total, ref) for ref in refs]
        results.append(taker.run.remote(total_of_refs, refs))
        del refs
        assert ray.get(results) == [count] * 20 + [20 * count]
        settled()


def test_puts_return_to_the_start(
    maker: Any, taker: Any, settled: Callable[[], None], transport: str
) -> None:
    def put_and_send(_: Peer, to: Any) -> float:
        refs = [ray.put(torch.ones(LARGE), _tensor_transport=transport) for _ in range(5)]
        return ray.get(to.run.remote(total_of_refs, refs))

    assert ray.get(maker.run.remote(put_and_send, taker)) == 5 * LARGE
    own = ray.put(torch.ones(LARGE), _tensor_transport=transport)
    assert ray.experimental.rdt.stats()["stored_objects"] == 1
    assert ray.get(taker.run.remote(total, own)) == LARGE
    del own
    settled()


def test_results_that_nobody_asks_for_are_freed(maker: Any, settled: Callable[[], None]) -> None:
    for _ in range(50):
        maker.make.remote(ones)
    settled()


def test_failed_and_empty_results_leave_nothing(maker: Any, settled: Callable[[], None]) -> None:
    def fail(_: Peer) -> None:
        raise ValueError("on purpose")

    refs = [maker.make.remote(fail), maker.make.remote(lambda _: None)]
    ray.wait(refs, num_returns=2)
    del refs
    settled()


def test_nested_references_are_freed_after_the_outer_one(
    maker: Any, taker: Any, settled: Callable[[], None]
) -> None:
    def nest(_: Peer) -> dict[str, Any]:
        return {
            "t": torch.ones(LARGE),
            "inner": ray.put(torch.ones(LARGE), _tensor_transport="auto"),
        }

    def total_of_both(peer: Peer, outer: dict[str, Any]) -> float:
        return total(peer, outer["t"], ray.get(outer["inner"]))

    ref = maker.make.remote(nest)
    assert ray.get(taker.run.remote(total_of_both, ref)) == 2 * LARGE
    assert ray.get(maker.stats.remote())["stored_objects"] == 2
    del ref
    settled()


def test_references_that_were_passed_around_are_freed(
    maker: Any, taker: Any, settled: Callable[[], None]
) -> None:
    def submit(_: Peer, to: Any) -> list[Any]:
        return [to.make.remote(ones)]

    refs = ray.get(taker.run.remote(submit, maker))
    assert ray.get(ray.get(taker.run.remote(lambda _, refs: refs, refs))[0]).sum() == LARGE
    del refs
    settled()


def test_received_memory_goes_back_when_the_last_tensor_dies(
    maker: Any, taker: Any, settled: Callable[[], None]
) -> None:
    got = ray.get(maker.make.remote(lambda _: [torch.ones(LARGE), torch.ones(10)]))
    small = got[1]
    del got
    wait_until(
        lambda: ray.experimental.rdt.stats()["pool_used"] < 4 * LARGE, "the large one is back"
    )
    assert small.tolist() == [1.0] * 10
    del small
    settled()


def test_an_object_lives_while_any_process_has_a_reference(
    maker: Any, taker: Any, settled: Callable[[], None]
) -> None:
    ref = maker.make.remote(ones)
    ray.get(taker.run.remote(lambda peer, refs: peer.kept.update(refs=refs), [ref]))
    del ref
    gc.collect()
    for _ in range(5):
        assert ray.get(taker.run.remote(lambda p: total_of_refs(p, p.kept["refs"]))) == LARGE
    ray.get(taker.run.remote(lambda peer: peer.kept.clear()))
    settled()


def test_objects_of_a_dead_owner_are_freed_and_lost_to_borrowers(
    maker: Any, settled: Callable[[], None], spawn: Any
) -> None:
    def submit(_: Peer, to: Any) -> list[Any]:
        refs = [to.make.remote(ones) for _ in range(3)]
        ray.wait(refs, num_returns=3)
        return refs

    owner = spawn()
    borrowed = ray.get(owner.run.remote(submit, maker))
    assert ray.get(borrowed[0]).sum() == LARGE
    assert ray.get(maker.stats.remote())["stored_objects"] == 3
    ray.kill(owner)
    settled()
    with pytest.raises(ray.exceptions.ObjectLostError):
        ray.get(borrowed[1], timeout=60)


def test_retried_tasks_copies_are_all_freed(
    maker: Any, settled: Callable[[], None], tmp_path: Any
) -> None:
    def fail_once(_: Peer, marker: Any) -> torch.Tensor:
        if not marker.exists():
            marker.touch()
            raise ValueError("once")
        return torch.ones(LARGE)

    method = maker.make.options(max_task_retries=1, retry_exceptions=True)
    assert ray.get(method.remote(fail_once, tmp_path / "failed")).sum() == LARGE
    settled()


def keep_and_return(peer: Peer, view_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    peer.kept["t"] = torch.ones(LARGE)
    return view_of(peer.kept["t"])


def wait_freed(peer: Peer, timeout: float | None) -> str:
    try:
        wait_tensor_freed(peer.kept["t"], timeout)
    except TimeoutError as error:
        return str(error)
    return "freed"


@pytest.mark.parametrize(
    "view_of",
    [lambda t: t, lambda t: t[5:10], lambda t: t.view(2, -1).t()],
    ids=["itself", "slice", "transposed"],
)
def test_wait_tensor_freed(maker: Any, view_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    ref = maker.make.remote(keep_and_return, view_of)
    ray.get(ref)
    assert "in use" in ray.get(maker.run.remote(wait_freed, 0.2))
    assert "in use" in ray.get(maker.run.remote(wait_freed, 0))
    del ref
    assert ray.get(maker.run.remote(wait_freed, 30)) == "freed"
    assert ray.get(maker.run.remote(wait_freed, None)) == "freed"
    ray.get(maker.run.remote(lambda peer: peer.kept.clear()))


def has_tensor(peer: Peer) -> bool:
    store = ray._private.worker.global_worker.rdt_manager.rdt_store
    return bool(store.has_tensor(peer.kept["t"]))


def test_store_has_a_tensor_until_its_object_is_gone(maker: Any) -> None:
    ref = maker.make.remote(keep_and_return, lambda t: t[5:])
    ray.get(ref)
    assert ray.get(maker.run.remote(has_tensor))
    del ref
    assert ray.get(maker.run.remote(wait_freed, 30)) == "freed"
    assert not ray.get(maker.run.remote(has_tensor))
    ray.get(maker.run.remote(lambda peer: peer.kept.clear()))


def test_wait_tensor_freed_with_two_objects_over_one_memory(maker: Any) -> None:
    first = maker.make.remote(keep_and_return, lambda t: t)
    second = maker.make.remote(lambda peer: {"part": peer.kept["t"][:5]})
    ray.wait([first, second], num_returns=2)
    del first
    assert "in use" in ray.get(maker.run.remote(wait_freed, 0.3))
    del second
    assert ray.get(maker.run.remote(wait_freed, 30)) == "freed"
    ray.get(maker.run.remote(lambda peer: peer.kept.clear()))


def test_wait_tensor_freed_of_a_tensor_that_is_in_no_object() -> None:
    wait_tensor_freed(torch.ones(3), 0)


def test_wait_tensor_freed_wakes_as_the_reference_goes(local_ray: None, taker: Any) -> None:
    tensor = torch.ones(LARGE)
    ref = ray.put([tensor], _tensor_transport="auto")
    used = taker.run.remote(lambda peer, got: total(peer, *got), ref)
    del ref
    wait_tensor_freed(tensor, 30)
    assert ray.get(used) == LARGE


def test_producers_tensor_dies_with_the_object(maker: Any) -> None:
    def make(peer: Peer) -> torch.Tensor:
        tensor = torch.ones(LARGE)
        peer.kept["weak"] = weakref.ref(tensor)
        return tensor

    def is_alive(peer: Peer) -> bool:
        gc.collect()
        return peer.kept["weak"]() is not None

    ref = maker.make.remote(make)
    ray.get(ref)
    assert ray.get(maker.run.remote(is_alive))
    del ref
    wait_until(lambda: not ray.get(maker.run.remote(is_alive)), "the tensor is gone")


def test_user_is_warned_once_that_producer_and_others_share_a_tensor(
    maker: Any, taker: Any
) -> None:
    ref = maker.make.remote(ones)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        taker.run.remote(total, ref)
        assert not caught
        maker.run.remote(total, ref)
        maker.run.remote(total, ref)
        taker.run.remote(total, ref)
    assert [warning.category for warning in caught] == [UserWarning]
    assert f"RDT ObjectRef({ref.hex()})" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_user_is_not_warned_where_only_others_or_only_the_producer_has_it(
    maker: Any, taker: Any, consumer: Any
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        others, own = maker.make.remote(ones), maker.make.remote(ones)
        used = [peer.run.remote(total, others) for peer in (taker, consumer)]
        used += [maker.run.remote(total, own) for _ in range(2)]
        ray.get(used)
    assert not caught


# Actors whose last handle is gone.


@ray.remote(num_cpus=0)
class Maker:
    def one(self, count: int) -> torch.Tensor:
        return torch.ones(count)

    def three(self, count: int) -> list[torch.Tensor]:
        return [torch.ones(count) for _ in range(3)]

    def items(self, count: int) -> Iterator[torch.Tensor]:
        for _ in range(3):
            yield torch.ones(count)

    def fail(self) -> None:
        raise ValueError("on purpose")

    def done(self) -> None:
        """Comes after the calls before it."""


def state_of(actor_id: str) -> str:
    return str(ray._private.state.actors(actor_id)["State"])


def assert_is_kept(actor_id: str) -> None:
    """For longer than Ray takes to end an actor."""
    gc.collect()
    time.sleep(1)
    assert state_of(actor_id) == "ALIVE"


def assert_ends(actor_id: str) -> None:
    gc.collect()
    wait_until(lambda: state_of(actor_id) == "DEAD", "the actor has ended", limit_s=10)


@pytest.mark.parametrize("method", ["three", "items"])
def test_actor_lives_as_long_as_its_objects(local_ray: None, method: str) -> None:
    actor = Maker.remote()
    actor_id = actor._actor_id.hex()
    num_returns = 3 if method == "three" else "streaming"
    options = {"num_returns": num_returns, "tensor_transport": "auto"}
    held = getattr(actor, method).options(**options).remote(LARGE)
    ray.get(actor.done.remote())
    del actor
    assert_is_kept(actor_id)
    refs = list(held)
    assert [int(ray.get(ref).sum()) for ref in refs] == [LARGE] * 3
    if method == "three":
        held.clear()
    del refs[:2]
    assert int(ray.get(refs[0]).sum()) == LARGE
    refs.clear()
    assert_ends(actor_id)


def test_actor_lives_as_long_as_others_have_its_objects(taker: Any) -> None:
    actor = Maker.remote()
    actor_id = actor._actor_id.hex()
    ref = actor.one.options(tensor_transport="auto").remote(LARGE)
    ray.get(taker.run.remote(lambda peer, refs: peer.kept.update(refs=refs), [ref]))
    ray.get(actor.done.remote())
    del actor, ref
    assert_is_kept(actor_id)
    assert ray.get(taker.run.remote(lambda p: total_of_refs(p, p.kept["refs"]))) == LARGE
    ray.get(taker.run.remote(lambda peer: peer.kept.clear()))
    assert_ends(actor_id)


def test_results_of_actors_that_nothing_else_refers_to(local_ray: None, transport: str) -> None:
    ref = Maker.remote().one.options(tensor_transport=transport).remote(LARGE)
    ray.wait([ref])
    assert int(ray.get(ref).sum()) == LARGE


def test_actor_ends_whose_values_do_not_need_it(local_ray: None) -> None:
    """Small objects, values without tensors, and errors once nobody has them."""
    actors = [Maker.remote() for _ in range(3)]
    actor_ids = [actor._actor_id.hex() for actor in actors]
    small = actors[0].one.options(tensor_transport="auto").remote(3)
    plain = actors[1].three.options(tensor_transport="auto").remote(0)
    error = actors[2].fail.options(tensor_transport="auto").remote()
    ray.wait([small, plain, error], num_returns=3)
    actors.clear()
    for actor_id in actor_ids[:2]:
        assert_ends(actor_id)
    assert ray.get(small).tolist() == [1.0] * 3
    assert len(ray.get(plain)) == 3
    del error
    assert_ends(actor_ids[2])


def test_actor_that_is_killed_loses_its_objects(local_ray: None) -> None:
    actor = Maker.remote()
    ref = actor.one.options(tensor_transport="auto").remote(LARGE)
    ray.wait([ref])
    ray.kill(actor)
    assert_ends(actor._actor_id.hex())
    with pytest.raises(ray.exceptions.ActorDiedError):
        ray.get(ref)


#: The first actor's handle is let go before there is a thread for such work: one begins.
HANDLES = """
import sys, threading, time, torch, ray, ray.actor
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
from tests.integration.test_lifetime import LARGE, Maker
names, end = [], ray.actor.ActorHandle.__del__
def noted(handle):
    names.append(threading.current_thread().name)
    end(handle)
ray.actor.ActorHandle.__del__ = noted
actor = Maker.remote()
ref = actor.one.options(tensor_transport="auto").remote(LARGE)
ray.wait([ref], fetch_local=False)
del actor, ref
deadline = time.monotonic() + 30
while not names and time.monotonic() < deadline:
    time.sleep(0.1)
print("let go on", names)
"""


def test_handles_are_let_go_on_no_thread_of_rays(tmp_path: Path) -> None:
    assert "let go on ['rdt-call_0']" in run_driver(HANDLES, tmp_path)


#: Submits, then shuts down while replies are coming.
SHUTDOWNS = """
import ray
from ray.experimental.rdt.common.descriptor import Location
from tests.integration.test_lifetime import LARGE, Maker
for _ in range(2):
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    make = Maker.remote().one.options(tensor_transport="auto")
    assert ray.get(make.remote(LARGE)).sum() == LARGE
    refs = [make.remote(count) for count in [3, LARGE] * 200]
    manager = ray._private.worker.global_worker.rdt_manager
    parts, end = manager._parts, manager._parts.end
    def end_and_hear_more():
        end()
        created = manager.set_tensor_transport_metadata_and_trigger_queued_operations
        created("ab", Location(b"", b"", 1))
        assert parts.peek() is None
        try:
            parts.get()
        except RuntimeError as error:
            print(error)
    parts.end = end_and_hear_more
    ray.shutdown()
    parts.end = end
    assert parts.peek() is None
"""


def test_replies_begin_no_session_while_ray_shuts_down(tmp_path: Path) -> None:
    assert run_driver(SHUTDOWNS, tmp_path).count("Ray is shutting down\n") == 2
