"""Collective groups of real actors: made, used, ended, and what can be wrong with them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import ray
from ray.experimental import collective
from ray.experimental.rdt.common import config
from ray.experimental.rdt.groups.membership import membership
from tests.integration.peers import LARGE, count_up, total
from tests.support import wait_until

TOTAL = float(torch.arange(LARGE, dtype=torch.float64).sum())

create = collective.create_collective_group
destroy = collective.destroy_collective_group
find = collective.get_collective_groups


@pytest.fixture(autouse=True)
def no_group_is_left(local_ray: None) -> Iterator[None]:
    yield
    for group in find([]):
        destroy(group)


def send(producer: Any, consumer: Any) -> None:
    """One object from one actor to another over gloo."""
    ref = producer.make.options(tensor_transport="gloo").remote(count_up)
    assert ray.get(consumer.run.remote(total, ref), timeout=30) == TOTAL


def link_scopes(peer: Any) -> list[str]:
    """Runs on: an actor. The names of the groups that its gloo links belong to."""
    transport = ray._private.worker.global_worker.rdt_manager.transport("gloo")
    names = {group.id: group.name for group in membership().all()}
    return sorted(names[link.scope] for link in transport._links._by_id.values() if link.scope)


def scopes(*actors: Any) -> list[list[str]]:
    return ray.get([actor.run.remote(link_scopes) for actor in actors])


def wait_at_gate(peer: Any) -> None:
    peer.gate.wait(60)


@pytest.fixture
def trio(producer: Any, consumer: Any, third: Any) -> list[Any]:
    """Three actors that live on."""
    return [producer, consumer, third]


# Life.


def test_group_is_connected_used_and_found(trio: list[Any]) -> None:
    assert find(trio) == []
    group = create(trio, "gloo", name="one")
    assert group.name == "one"
    assert [group.get_rank(actor) for actor in trio] == [0, 1, 2]
    assert find(trio) == find(trio[:1]) == find(trio, "GLOO") == [group]
    assert find(trio, "nccl") == []
    assert scopes(*trio) == [["one"] * 4] * 3
    for producer in trio:
        for consumer in trio:
            send(producer, consumer)
    assert scopes(*trio) == [["one"] * 4] * 3


def test_destroyed_group_can_be_made_again_at_once(trio: list[Any]) -> None:
    for members in (trio, trio[:2], trio[1:]):
        group = create(members, "gloo", name="again")
        assert scopes(*members) == [["again"] * 2 * (len(members) - 1)] * len(members)
        send(*members[:2])
        destroy(group)
        assert find(trio) == []
        assert scopes(*trio) == [[]] * 3
    with pytest.raises(ValueError, match="No group with name again found"):
        destroy(group)
    with pytest.raises(ValueError, match="again"):
        destroy("again")


def test_actors_without_a_group_connect_by_themselves(spawn: Callable[..., Any]) -> None:
    producer, consumer = spawn(), spawn()
    send(producer, consumer)
    group = create([producer, consumer], "gloo", name="later")
    send(producer, consumer)
    destroy(group)
    send(producer, consumer)


def test_actor_in_several_groups(trio: list[Any]) -> None:
    a, b, c = trio
    create([a, b], "gloo", name="ab")
    create([c, a], "gloo", name="ca")
    create([a, b, c], "gloo", name="all")
    assert sorted(group.name for group in find([a])) == ["ab", "all", "ca"]
    for producer, consumer in ((a, b), (b, a), (a, c), (b, c)):
        send(producer, consumer)
    destroy("ab")
    send(a, b)
    assert sorted(group.name for group in find([a, b])) == ["all"]


@pytest.mark.parametrize("backend", ["GLOO", "torch_gloo", "TORCH_GLOO"])
def test_other_spellings_of_gloo(producer: Any, backend: str) -> None:
    group = create([producer], backend)
    assert group.backend == "GLOO"
    assert find([producer], backend) == [group]


def test_asyncio_and_threaded_actors(spawn: Callable[..., Any], consumer: Any) -> None:
    @ray.remote(num_cpus=0)
    class Async:
        @ray.method(tensor_transport="gloo")
        async def make(self) -> torch.Tensor:
            return torch.arange(LARGE, dtype=torch.float32)

        async def total(self, tensor: torch.Tensor) -> float:
            return float(tensor.double().sum())

    a, threaded = spawn(Async), spawn(max_concurrency=4)
    create([a, threaded, consumer], "gloo")
    ref = threaded.make.options(tensor_transport="gloo").remote(count_up)
    assert ray.get(a.total.remote(ref), timeout=30) == TOTAL
    assert ray.get(threaded.run.remote(total, a.make.remote()), timeout=30) == TOTAL
    assert ray.get(consumer.run.remote(total, a.make.remote()), timeout=30) == TOTAL


def test_destroy_all_ends_what_this_process_made(trio: list[Any]) -> None:
    creator, *actors = trio
    ray.get(
        creator.run.remote(lambda peer, members: create(members, "gloo", "theirs").name, actors)
    )
    create(actors, "gloo", name="mine")
    create(actors[:1], "gloo", name="mine too")
    collective.destroy_all_collective_groups()
    assert [group.name for group in find([])] == ["theirs"]
    collective.destroy_all_collective_groups()


# Several processes.


def make_here(peer: Any, members: list[Any], name: str) -> Any:
    return create(members, "gloo", name=name)


def test_group_made_by_one_process_serves_others(
    spawn: Callable[..., Any], trio: list[Any]
) -> None:
    creator, other, *actors = [spawn(), *trio]
    group = ray.get(creator.run.remote(make_here, actors, "shared"))
    send(*actors)
    assert scopes(*actors) == [["shared"] * 2] * 2
    (found,) = find(actors)
    assert found.name == group.name
    assert [actor._ray_actor_id for actor in found.actors] == [a._ray_actor_id for a in actors]
    assert ray.get(found.actors[0].pid.remote()) == ray.get(actors[0].pid.remote())
    ray.get(other.run.remote(lambda peer, handle: destroy(handle), group))
    assert find(actors) == []
    assert scopes(*actors) == [[]] * 2


def test_actor_makes_a_group_with_itself(trio: list[Any]) -> None:
    creator, other, _ = trio
    handle = ray.get(creator.run.remote(make_here, [creator, other], "mine"), timeout=30)
    assert scopes(creator, other) == [["mine"] * 2] * 2
    send(creator, other)
    destroy(handle)


def test_borrowers_of_an_object_receive_it(trio: list[Any]) -> None:
    producer, consumer, outsider = trio
    create([producer, consumer], "gloo", name="pair")
    ref = producer.make.options(tensor_transport="gloo").remote(count_up)

    def pass_on(peer: Any, refs: list[Any], to: Any) -> float:
        return ray.get(to.run.remote(total, refs[0]))

    assert ray.get(outsider.run.remote(pass_on, [ref], consumer), timeout=30) == TOTAL
    assert ray.get(consumer.run.remote(pass_on, [ref], outsider), timeout=30) == TOTAL
    assert float(ray.get(ref).double().sum()) == TOTAL


@pytest.mark.filterwarnings("ignore:RDT ObjectRef")
def test_all_pairs_at_once(trio: list[Any]) -> None:
    create(trio, "gloo")
    results = []
    for _ in range(5):
        refs = [a.make.options(tensor_transport="gloo").remote(count_up) for a in trio]
        results += [a.run.remote(total, *refs) for a in trio]
    assert ray.get(results, timeout=60) == [TOTAL * 3] * 15


# What can be wrong.


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"'mpi'.*gloo, nccl"):
        create([], "mpi")
    with pytest.raises(ValueError, match=r"'mpi'.*gloo, nccl"):
        find([], "mpi")


def test_not_actors(producer: Any) -> None:
    with pytest.raises(ValueError, match="at least one"):
        create([], "gloo")
    with pytest.raises(ValueError, match="actor handles"):
        create(["producer"], "gloo")
    with pytest.raises(ValueError, match="CommunicatorHandle or str"):
        destroy(7)
    with pytest.raises(ValueError, match="name"):
        create([producer], "gloo", name="")


def test_actor_given_twice_is_named(producer: Any, consumer: Any) -> None:
    actor_id = producer._ray_actor_id.hex()
    with pytest.raises(ValueError, match=f"All actors must be unique.*{actor_id}"):
        create([producer, consumer, producer], "gloo")


def test_name_in_use(producer: Any, consumer: Any) -> None:
    create([producer], "gloo", name="taken")
    with pytest.raises(ValueError, match="'taken' is in use"):
        create([consumer], "gloo", name="taken")
    send(producer, consumer)


def test_nccl_without_a_gpu(producer: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RuntimeError, match="GPU"):
        create([producer], "nccl", name="no")
    assert find([]) == []


def test_dead_actor_is_named_and_nothing_is_left(
    spawn: Callable[..., Any], trio: list[Any]
) -> None:
    a, b, dead = trio[0], trio[1], spawn()
    ray.get(dead.pid.remote())
    ray.kill(dead)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=f"{dead._ray_actor_id.hex()}.*is dead"):
        create([a, dead, b], "gloo", name="broken")
    assert time.monotonic() - started < 10
    assert find([]) == []
    create([a, b], "gloo", name="broken")
    send(a, b)


@pytest.fixture
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_RDT_GROUP_TIMEOUT_S", "2")
    config.settings.cache_clear()
    yield
    monkeypatch.undo()
    config.settings.cache_clear()


def test_busy_actor_is_named_and_nothing_is_left(trio: list[Any], short_timeout: None) -> None:
    a, b, busy = trio
    ray.get([actor.pid.remote() for actor in (a, b, busy)])
    done = busy.run.remote(lambda peer: time.sleep(6))
    with pytest.raises(RuntimeError, match=f"No answer within 2 s.*{busy._ray_actor_id.hex()}"):
        create([a, busy, b], "gloo", name="waiting")
    assert find([]) == []
    ray.get(done)
    assert scopes(a, b, busy) == [[]] * 3
    create([a, busy, b], "gloo", name="waiting")
    send(a, busy)


def test_busy_actors_leave_all_the_same(spawn: Callable[..., Any]) -> None:
    actors = [spawn(max_concurrency=2) for _ in range(2)]
    group = create(actors, "gloo", name="busy")
    waiting = [actor.run.remote(wait_at_gate) for actor in actors]
    started = time.monotonic()
    destroy(group)
    assert time.monotonic() - started < 5
    assert find([]) == []
    ray.get([actor.open.remote() for actor in actors])
    ray.get(waiting)
    assert scopes(*actors) == [[]] * 2
    create(actors, "gloo", name="busy")


def test_dead_members_are_no_error_when_a_group_ends(
    spawn: Callable[..., Any], trio: list[Any]
) -> None:
    a, b, dead = trio[0], trio[1], spawn()
    group = create([a, b, dead], "gloo", name="lossy")
    ray.kill(dead)
    send(a, b)
    destroy(group)
    assert find([]) == []
    assert scopes(a, b) == [[], []]
    create([a, b], "gloo", name="lossy")
    send(a, b)


def test_name_of_a_group_whose_actors_all_died_is_free(
    spawn: Callable[..., Any], producer: Any
) -> None:
    old, new = spawn(), producer
    create([old], "gloo", name="outlived")
    ray.kill(old)
    wait_until(
        lambda: ray._private.state.actors(old._ray_actor_id.hex())["State"] == "DEAD", "still alive"
    )
    create([new], "gloo", name="outlived")


def test_restarted_actor_is_no_member_and_still_served(
    spawn: Callable[..., Any], consumer: Any
) -> None:
    a, b = spawn(max_restarts=1, max_task_retries=-1), consumer
    group = create([a, b], "gloo", name="restarts")
    pid = ray.get(a.pid.remote())
    ray.kill(a, no_restart=False)
    wait_until(lambda: ray.get(a.pid.remote()) != pid, "not restarted")
    send(a, b)
    send(b, a)
    destroy(group)


# The user's own use of torch.distributed and ray.util.collective.


def own_default_group(peer: Any) -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def use_default_group(peer: Any) -> tuple[int, int, list[str]]:
    tensor = torch.ones(3)
    torch.distributed.all_reduce(tensor)
    names = sorted(k for k in os.environ if k in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    return torch.distributed.get_world_size(), int(tensor.sum()), names


def test_default_process_group_of_the_user_keeps_working(
    spawn: Callable[..., Any], consumer: Any
) -> None:
    a, b = spawn(), consumer
    ray.get(a.run.remote(own_default_group))
    group = create([a, b], "gloo")
    send(a, b)
    send(b, a)
    assert ray.get(a.run.remote(use_default_group)) == (1, 3, [])
    destroy(group)
    assert ray.get(a.run.remote(use_default_group)) == (1, 3, [])
    assert ray.get(b.run.remote(lambda peer: torch.distributed.is_initialized())) is False


def filled(peer: Any, number: int) -> torch.Tensor:
    return torch.full((LARGE,), float(number))


def operate(peer: Any, name: str, rank: int, received: torch.Tensor) -> dict[str, Any]:
    """Runs on: each of three members. One of each collective operation.

    ``received`` came as an RDT object, as big as an object has to be to be pulled.
    """
    from ray.util import collective as operations
    from ray.util.collective.types import ReduceOp

    def mine() -> torch.Tensor:
        return torch.full((2,), float(rank + 1))

    results = {"ranks": [operations.get_rank(name), operations.get_collective_group_size(name)]}
    gathered, scattered = [torch.zeros(LARGE) for _ in range(3)], torch.zeros(LARGE)
    collective.allgather(gathered, received, name)
    collective.reducescatter(scattered, gathered, name)
    collective.allreduce(received, name)
    results["received"] = [float(each[-1]) for each in (*gathered, scattered, received)]
    tensor = mine()
    collective.allreduce(tensor, name)
    results["allreduce"] = tensor.tolist()
    tensor = mine()
    operations.allreduce(tensor, name, ReduceOp.MAX)
    results["max"] = tensor.tolist()
    parts = [torch.zeros(2) for _ in range(3)]
    collective.allgather(parts, mine(), name)
    results["allgather"] = torch.stack(parts)[:, 0].tolist()
    output = torch.zeros(2)
    collective.reducescatter(output, [mine() * i for i in range(3)], name)
    results["reducescatter"] = output.tolist()
    tensor = mine()
    operations.broadcast(tensor, 1, name)
    results["broadcast"] = tensor.tolist()
    tensor = mine()
    operations.reduce(tensor, 2, name)
    results["reduce"] = tensor.tolist()
    operations.barrier(name)
    tensor = mine()
    if rank == 0:
        operations.send(tensor, 2, name)
    elif rank == 2:
        operations.recv(tensor, 0, name)
    results["recv"] = tensor.tolist()
    return results


def test_collective_operations_under_the_name_of_the_group(trio: list[Any]) -> None:
    create(trio, "gloo", name="ops")
    # Each member has made what the one before it operates on.
    refs = [
        trio[i - 2].make.options(tensor_transport="gloo").remote(filled, i + 1) for i in range(3)
    ]
    jobs = [a.run.remote(operate, "ops", i, refs[i]) for i, a in enumerate(trio)]
    results = ray.get(jobs, timeout=60)
    for rank, result in enumerate(results):
        assert result["ranks"] == [rank, 3]
        assert result["received"] == [1.0, 2.0, 3.0, 3.0 * (rank + 1), 6.0]
        assert result["allreduce"] == [6.0, 6.0]
        assert result["max"] == [3.0, 3.0]
        assert result["allgather"] == [1.0, 2.0, 3.0]
        assert result["reducescatter"] == [6.0 * rank] * 2
        assert result["broadcast"] == [2.0, 2.0]
        assert result["reduce"] == ([6.0, 6.0] if rank == 2 else [rank + 1.0] * 2)
        assert result["recv"] == [1.0 if rank in (0, 2) else 2.0] * 2
    send(*trio[:2])
    destroy("ops")

    def is_known(peer: Any) -> bool:
        return bool(ray.util.collective.is_group_initialized("ops"))

    assert ray.get([actor.run.remote(is_known) for actor in trio]) == [False] * 3


def operate_in(peer: Any, name: str, rank: int, size: int) -> dict[str, list[float]]:
    """Runs on: each member of a group of any size."""
    from ray.util import collective as operations

    def mine() -> torch.Tensor:
        return torch.full((2,), float(rank + 1))

    reduced, sent, gathered = mine(), mine(), [torch.zeros(2) for _ in range(size)]
    scattered = torch.zeros(2)
    operations.allreduce(reduced, name)
    operations.barrier(name)
    operations.broadcast(sent, size - 1, name)
    operations.allgather(gathered, mine(), name)
    operations.reducescatter(scattered, [mine() for _ in range(size)], name)
    to_first = mine()
    operations.reduce(to_first, 0, name)
    return {
        "sums": [float(each[0]) for each in (reduced, scattered)],
        "broadcast": sent.tolist(),
        "allgather": [float(each[0]) for each in gathered],
        "reduce": to_first.tolist(),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_collective_operations_in_groups_of_every_size(
    trio: list[Any], spawn: Callable[..., Any], size: int
) -> None:
    members = [*trio, spawn()][:size] if size > 3 else trio[:size]
    create(members, "gloo", name="sized")
    jobs = [a.run.remote(operate_in, "sized", rank, size) for rank, a in enumerate(members)]
    results = ray.get(jobs, timeout=30)
    total_of_all = float(sum(range(size + 1)))
    for rank, result in enumerate(results):
        assert result == {
            "sums": [total_of_all] * 2,
            "broadcast": [float(size)] * 2,
            "allgather": [float(each + 1) for each in range(size)],
            "reduce": [total_of_all if rank == 0 else rank + 1.0] * 2,
        }


def exchange(peer: Any, name: str, rank: int, source: int, destination: int) -> list[float]:
    from ray.util import collective as operations

    tensor = torch.full((2,), float(rank))
    if rank == source:
        operations.send(tensor, destination, name)
    else:
        operations.recv(tensor, source, name)
    return tensor.tolist()


def allreduce(peer: Any, name: str) -> list[float]:
    tensor = torch.ones(2)
    ray.util.collective.allreduce(tensor, name)
    return tensor.tolist()


def test_send_and_recv_take_two_members(trio: list[Any]) -> None:
    """They may be the first operations of a group, and the others need not do anything."""
    create(trio, "gloo", name="pairs")
    for source, destination in ((0, 1), (1, 0), (1, 2), (2, 0)):
        jobs = [
            trio[rank].run.remote(exchange, "pairs", rank, source, destination)
            for rank in (source, destination)
        ]
        assert ray.get(jobs, timeout=15) == [[float(source)] * 2] * 2
    everybody = [actor.run.remote(allreduce, "pairs") for actor in trio]
    assert ray.get(everybody, timeout=15) == [[3.0] * 2] * 3
