"""Objects whose producer dies after it made them: calls that may be retried reconstruct them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import ActorDiedError, ObjectLostError

import ray
from ray.experimental import set_target_for_ref
from ray.experimental.rdt import receive_into
from ray.experimental.rdt.common.errors import RDTProducerDiedError
from tests.chaos.faults import LONG, fetch, kill, numbers, pid_of, stat, wait_idle, wait_pinned
from tests.integration.peers import LARGE, Peer, ones, total_of_refs
from tests.support import wait_until

pytestmark = pytest.mark.slow

RETRIED = {"max_restarts": -1, "max_task_retries": -1}


def counted(peer: Peer, runs: Path, *tensors: torch.Tensor, length: int = LARGE) -> torch.Tensor:
    """The numbers from how many tensors were given on; ``runs`` is a byte longer after each run."""
    with runs.open("ab") as file:
        file.write(b".")
    return torch.arange(length, dtype=torch.int32) + len(tensors)


def runs_in(file: Path) -> int:
    return file.stat().st_size


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def lose(maker: Any, *refs: Any) -> None:
    """Ends the actor's process once it holds the objects."""
    ray.wait(list(refs), num_returns=len(refs), fetch_local=False, timeout=100)
    kill(pid_of(maker))


def is_right(got: torch.Tensor, first: int = 0) -> bool:
    return torch.equal(got, torch.arange(LARGE, dtype=torch.int32) + first)


@ray.remote(num_cpus=0)
class AsyncTaker:
    async def take(self, tensor: torch.Tensor) -> bool:
        return is_right(tensor)

    async def wait_for(self, refs: list[Any]) -> bool:
        return all([is_right(await ref) for ref in refs])


def test_all_consumers_get_the_reconstructed_object(spawn: Any, consumer: Any, runs: Path) -> None:
    """The call is made a second time, and not once for each who asks."""
    maker, late = spawn(**RETRIED), spawn(AsyncTaker)
    before = ray.experimental.rdt.stats()
    ref = maker.make.remote(counted, runs)
    ray.get(late.wait_for.remote([]))
    lose(maker, ref)
    asked = [
        consumer.run.remote(lambda _, tensor: is_right(tensor), ref),
        consumer.run.remote(lambda _, refs: is_right(ray.get(refs[0])), [ref]),
        late.take.remote(ref),
        late.wait_for.remote([ref]),
        ray.remote(num_cpus=0)(is_right).remote(ref),
    ]
    assert is_right(asyncio.run(awaited(ref)))
    assert is_right(ray.get(ref, timeout=100))
    assert ray.get(asked, timeout=100) == [True] * 5
    assert runs_in(runs) == 2
    # It may be lost as often as the call may be retried.
    kill(pid_of(maker))
    assert is_right(ray.get(ref, timeout=100))
    assert runs_in(runs) == 3
    del ref, asked
    wait_idle(maker)
    names = ("recipes", "directory_rows")

    def is_as_before() -> None:
        after = ray.experimental.rdt.stats()
        assert [after[name] for name in names] == [before[name] for name in names]

    wait_until(is_as_before)


async def awaited(ref: Any) -> torch.Tensor:
    return await asyncio.wait_for(ref, 100)


def test_producer_dies_while_its_bytes_flow(spawn: Any, takers: Any) -> None:
    taker, maker = takers["tcp"], spawn(**RETRIED)
    ref = maker.make.remote(numbers, 2 * LONG)
    pid = pid_of(maker)
    waiting = taker.run.remote(fetch, [ref])
    wait_pinned(maker)
    kill(pid)
    assert ray.get(waiting, timeout=100) == "right"


@ray.remote(num_cpus=0, tensor_transport="auto", num_returns=2)
def make_two(runs: Path, pids: Path) -> tuple[torch.Tensor, torch.Tensor]:
    pids.write_text(str(os.getpid()))
    first = counted(None, runs)  # type: ignore[arg-type]
    return first, first + 1


def test_task_runs_again(spawn: Any, consumer: Any, runs: Path, tmp_path: Path) -> None:
    """Its values reach others without a reference; they tell by themselves what they are."""
    pids = tmp_path / "pid"
    refs = make_two.remote(runs, pids)
    ray.wait(refs[:1], timeout=100)
    kill(int(pids.read_text()))

    def check(_: Peer | None, first: torch.Tensor, second: torch.Tensor) -> list[bool]:
        return [is_right(first), is_right(second, 1)]

    asked = [
        consumer.run.remote(check, *refs),
        consumer.run.remote(lambda _, refs: check(_, *ray.get(refs)), refs),
        ray.remote(num_cpus=0)(check).remote(None, *refs),
    ]
    assert check(None, *ray.get(refs, timeout=100)) == [True, True]
    assert ray.get(asked, timeout=100) == [[True, True]] * 3
    assert runs_in(runs) == 2
    del refs, asked
    wait_until(lambda: ray.experimental.rdt.stats()["recipes"] == 0, "its recipe is gone")


def test_arguments_are_reconstructed(spawn: Any, runs: Path, tmp_path: Path) -> None:
    """One that is lost and one that nobody refers to any more; and one is as it was."""
    maker = spawn(**RETRIED)
    held = maker.make.remote(counted, tmp_path / "held")
    changed = [tmp_path / "unused"]

    def use(peer: Peer, one: Any, two: Any, files: list[Path]) -> torch.Tensor:
        assert files == [tmp_path / "unused"]
        return counted(peer, runs, one, two)

    ref = maker.make.remote(use, held, maker.make.remote(counted, tmp_path / "dropped"), changed)
    changed.clear()
    lose(maker, ref)
    assert is_right(ray.get(ref, timeout=100), 2)
    assert [runs_in(file) for file in (runs, tmp_path / "held", tmp_path / "dropped")] == [2, 2, 2]


def test_chains_of_objects_keep_no_tensors(spawn: Any) -> None:
    """A recipe names the objects that its call took, and does not hold them."""
    maker = spawn(**RETRIED)
    ref = maker.make.remote(ones)
    for nested in (False, True) * 3:
        ref = maker.make.remote(
            lambda _, one: ones(_) if isinstance(one, list) else one + 1, [ref] if nested else ref
        )
    ray.get(ref)
    wait_until(lambda: stat(maker, "stored_objects") == 1, "only the last one is stored")
    assert ray.experimental.rdt.stats()["recipes"] == 1


def test_an_actor_does_not_wait_for_itself(spawn: Any, consumer: Any, runs: Path) -> None:
    maker = spawn(**RETRIED)
    ref = maker.make.remote(counted, runs)
    lose(maker, ref)
    with pytest.raises(RDTProducerDiedError, match="waits for the object itself"):
        ray.get(maker.run.remote(lambda _, tensor: is_right(tensor), ref), timeout=100)
    assert is_right(ray.get(ref, timeout=100))
    assert ray.get(maker.run.remote(lambda _, tensor: is_right(tensor), ref), timeout=100)


def test_it_is_received_into_targets(spawn: Any, runs: Path) -> None:
    @ray.remote(num_cpus=0)
    class Receiver:
        def __init__(self) -> None:
            self.own = torch.zeros(LARGE, dtype=torch.int32)

        @receive_into(tensor=lambda self: [self.own])
        def take(self, tensor: torch.Tensor) -> bool:
            return tensor.data_ptr() == self.own.data_ptr() and is_right(self.own)

    maker = spawn(**RETRIED)
    ref = maker.make.remote(counted, runs)
    lose(maker, ref)
    assert ray.get(spawn(Receiver).take.remote(ref), timeout=100)
    target = torch.zeros(LARGE, dtype=torch.int32)
    set_target_for_ref(ref, [target])
    ray.get(ref, timeout=100)
    assert is_right(target)


def test_what_it_is_now_may_be_something_else(spawn: Any, consumer: Any, runs: Path) -> None:
    """A value without tensors, and an exception."""

    def make_once(peer: Peer, runs: Path, then: Any) -> Any:
        if not runs.exists():
            return counted(peer, runs)
        if isinstance(then, Exception):
            raise then
        return then

    maker = spawn(**RETRIED)
    plain = maker.make.remote(make_once, runs, {"no": "tensors"})
    ray.wait([plain], timeout=100)
    raises = maker.make.remote(make_once, runs.with_name("others"), KeyError("why"))
    lose(maker, plain, raises)
    assert ray.get(plain, timeout=100) == {"no": "tensors"}
    assert ray.get(consumer.run.remote(lambda _, value: value, plain), timeout=100) == {
        "no": "tensors"
    }
    with pytest.raises(KeyError):
        ray.get(raises, timeout=100)


def test_retries_are_counted(spawn: Any, runs: Path) -> None:
    maker = spawn(max_restarts=-1, max_task_retries=1)
    ref = maker.make.remote(counted, runs)
    lose(maker, ref)
    assert is_right(ray.get(ref, timeout=100))
    kill(pid_of(maker))
    with pytest.raises(RDTProducerDiedError, match="all its retries are used up") as caught:
        ray.get(ref, timeout=100)
    assert isinstance(caught.value, ActorDiedError)
    assert isinstance(caught.value, ObjectLostError)
    assert runs_in(runs) == 2


def test_what_may_not_be_retried_is_lost(spawn: Any, consumer: Any, runs: Path) -> None:
    maker = spawn(max_restarts=-1)
    refs = [maker.make.remote(counted, runs)]
    refs.append(
        ray.get(maker.run.remote(lambda _: [ray.put(ones(_), _tensor_transport="auto")]))[0]
    )
    lose(maker, *refs[:1])
    with pytest.raises(RDTProducerDiedError, match="may not be retried"):
        ray.get(refs[0], timeout=100)
    with pytest.raises(ObjectLostError):
        ray.get(refs[1], timeout=100)
    assert ray.get(consumer.run.remote(fetch, refs[:1]), timeout=100) == "RDTProducerDiedError"
    assert runs_in(runs) == 1


def test_large_arguments_are_not_kept(spawn: Any) -> None:
    maker = spawn(**RETRIED)
    given = torch.ones(LARGE)
    ref = maker.make.remote(lambda _, tensor: tensor + 1, given)
    referred = maker.make.remote(lambda _, tensor: tensor + 1, ray.put(given))
    lose(maker, ref, referred)
    with pytest.raises(RDTProducerDiedError, match="pass an ObjectRef"):
        ray.get(ref, timeout=100)
    assert float(ray.get(referred, timeout=100).sum()) == 2 * LARGE


def test_owner_in_an_actor(spawn: Any, consumer: Any, runs: Path) -> None:
    """The driver borrows what another actor owns, and reconstructs nothing itself."""

    def own(peer: Peer, maker: Any) -> list[Any]:
        peer.kept["own"] = [maker.make.remote(counted, runs)]
        return peer.kept["own"]

    maker, owner = spawn(**RETRIED), spawn()
    refs = ray.get(owner.run.remote(own, maker))
    lose(maker, *refs)
    assert is_right(ray.get(refs[0], timeout=100))
    assert ray.get(consumer.run.remote(lambda _, tensor: is_right(tensor), refs[0]), timeout=100)
    assert runs_in(runs) == 2
    assert ray.get(consumer.run.remote(total_of_refs, [maker.make.remote(ones)])) == LARGE
