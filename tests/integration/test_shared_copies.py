"""One copy for all readers of a host: the map lane, as its users see it."""

from __future__ import annotations

import os
import pickle
import re
from typing import Any

import pytest
import torch

import ray
from tests.integration.peers import LANE_SETTINGS, LARGE, Peer, count_up, pulls, total
from tests.support import wait_until

READERS = 4
HUGE = 16 * LARGE  # 16 MiB


@pytest.fixture(scope="module")
def readers(local_ray: None) -> Any:
    """The first asks for a shared copy in any case, the others if there are several consumers."""
    lanes = {"RAY_RDT_LANES": LANE_SETTINGS["map"]}
    made = [Peer.options(runtime_env={"env_vars": lanes}).remote()]
    made += [Peer.remote() for _ in range(READERS - 1)]
    yield made
    for actor in made:
        ray.kill(actor)


def keep(peer: Peer, tensor: torch.Tensor) -> float:
    peer.kept["tensor"] = tensor
    return total(peer, tensor)


def drop(peer: Peer) -> None:
    peer.kept.clear()


def is_kept(peer: Peer, expected: torch.Tensor) -> bool:
    return torch.equal(peer.kept["tensor"], expected)


def shared_memory(pid: int) -> int:
    """The bytes of a process in the agents' files, each shared page in proportion."""
    with open(f"/proc/{pid}/smaps") as file:
        mappings = re.findall(r"/memfd:rdt .*\n(?:[A-Z].*\n)*?Pss: +(\d+) kB", file.read())
    return sum(map(int, mappings)) << 10


def private_memory(pid: int) -> int:
    with open(f"/proc/{pid}/status") as file:
        (line,) = [line for line in file if line.startswith("RssAnon:")]
    return int(line.split()[1]) << 10


def keep_and_touch(peer: Peer, tensor: torch.Tensor) -> float:
    """Needs no other memory of the tensor's size."""
    peer.kept["tensor"] = tensor
    return float(tensor.max())


def test_all_readers_get_the_bytes_and_hold_one_copy(producer: Any, readers: list[Any]) -> None:
    nbytes = 64 << 20
    pids = ray.get([actor.pid.remote() for actor in (producer, *readers)])

    def hand_out(value: int) -> Any:
        ref = producer.make.remote(lambda _, value: torch.full((nbytes // 4,), float(value)), value)
        found = ray.get([reader.run.remote(keep_and_touch, ref) for reader in readers])
        assert found == [value] * READERS
        return ref

    hand_out(1)  # the producer learns that its objects have several consumers
    ray.get([reader.run.remote(drop) for reader in readers])
    before = sum(map(private_memory, pids[1:]))
    ref = hand_out(2)
    assert sum(map(private_memory, pids[1:])) - before < 0.5 * nbytes
    assert 0.9 * nbytes < sum(map(shared_memory, pids)) < 1.5 * nbytes
    assert [pulls(reader)["map"] > 0 for reader in readers] == [True] * READERS
    ray.get([reader.run.remote(drop) for reader in readers])
    del ref


def test_no_reader_sees_what_another_one_writes(producer: Any, readers: list[Any]) -> None:
    def write(peer: Peer, number: float) -> bool:
        tensor = peer.kept["tensor"]
        tensor[: LARGE // 2] = number
        tensor[LARGE:] += number
        return True

    def check(peer: Peer, number: float) -> bool:
        expected = count_up(peer, HUGE)
        expected[: LARGE // 2] = number
        expected[LARGE:] += number
        return torch.equal(peer.kept["tensor"], expected)

    ref = producer.make.remote(count_up, HUGE)
    ray.get([reader.run.remote(keep, ref) for reader in readers])
    ray.get([reader.run.remote(write, i + 1) for i, reader in enumerate(readers)])
    assert all(ray.get([r.run.remote(check, i + 1) for i, r in enumerate(readers)]))
    ray.get([reader.run.remote(drop) for reader in readers])
    late = readers[0]
    assert ray.get(late.run.remote(total, ref)) == HUGE * (HUGE - 1) / 2


def test_readers_keep_their_bytes_whatever_the_producer_does(
    producer: Any, readers: list[Any]
) -> None:
    def make(peer: Peer) -> torch.Tensor:
        peer.kept["mine"] = count_up(peer, HUGE)
        return peer.kept["mine"]

    def overwrite(peer: Peer) -> None:
        peer.kept.pop("mine").zero_()

    ref = producer.make.remote(make)
    ray.get([reader.run.remote(keep, ref) for reader in readers])
    ray.get(producer.run.remote(overwrite))
    del ref
    for seed in range(6):  # new objects, which could use the same memory
        ref = producer.make.remote(lambda _, value: torch.full((HUGE,), float(value)), seed)
        assert ray.get(readers[0].run.remote(total, ref)) == seed * HUGE
    expected = count_up(None, HUGE)  # type: ignore[arg-type]
    assert all(ray.get([reader.run.remote(is_kept, expected) for reader in readers]))
    ray.get([reader.run.remote(drop) for reader in readers])


def test_readers_keep_their_bytes_after_the_producer_died(spawn: Any, readers: list[Any]) -> None:
    producer = spawn()
    ref = producer.make.remote(count_up, HUGE)
    ray.get([reader.run.remote(keep, ref) for reader in readers])
    ray.kill(producer)
    expected = count_up(None, HUGE)  # type: ignore[arg-type]
    assert all(ray.get([reader.run.remote(is_kept, expected) for reader in readers]))
    ray.get([reader.run.remote(drop) for reader in readers])


def test_a_reader_that_is_killed_harms_no_other(
    producer: Any, spawn: Any, readers: list[Any]
) -> None:
    doomed = spawn()
    ref = producer.make.remote(count_up, HUGE)
    ray.get([reader.run.remote(keep, ref) for reader in (doomed, *readers)])
    os.kill(ray.get(doomed.pid.remote()), 9)
    del ref
    for value in range(4):
        ref = producer.make.remote(lambda _, value: torch.full((HUGE,), float(value)), value)
        assert ray.get(readers[0].run.remote(total, ref)) == value * HUGE
    expected = count_up(None, HUGE)  # type: ignore[arg-type]
    assert all(ray.get([reader.run.remote(is_kept, expected) for reader in readers]))
    ray.get([reader.run.remote(drop) for reader in readers])


def test_a_forked_child_keeps_the_bytes(producer: Any, readers: list[Any]) -> None:
    def fork(peer: Peer) -> None:
        array = peer.kept.pop("tensor").numpy()
        go, told = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.read(go[0], 1)
                is_right = bool((array == range(len(array))).all())
                os.write(told[1], b"y" if is_right else b"n")
            finally:
                os._exit(0)
        del array
        peer.kept["child"] = (child, go[1], told[0])

    def ask(peer: Peer) -> bool:
        child, go, told = peer.kept.pop("child")
        os.write(go, b"x")
        answer = os.read(told, 1)
        os.waitpid(child, 0)
        return answer == b"y"

    reader = readers[0]
    ref = producer.make.remote(count_up, LARGE)
    ray.get(reader.run.remote(keep, ref))
    ray.get(reader.run.remote(fork))
    del ref
    for value in range(4):
        ref = producer.make.remote(lambda _, value: torch.full((LARGE,), float(value)), value)
        assert ray.get(reader.run.remote(total, ref)) == value * LARGE
    assert ray.get(reader.run.remote(ask))


def test_received_tensors_are_ordinary_tensors(producer: Any, readers: list[Any]) -> None:
    def use(peer: Peer, tensor: torch.Tensor) -> bool:
        expected = count_up(peer, LARGE)
        again = pickle.loads(pickle.dumps(tensor))
        shared = tensor.clone().share_memory_()
        moved = tensor.view(2, -1).t().contiguous().t().reshape(-1)
        tensor.requires_grad_(True)
        tensor.sum().backward()
        gradient = tensor.grad
        with torch.no_grad():
            tensor.mul_(1)
            tensor.share_memory_()
        assert gradient is not None
        return all(
            torch.equal(each.detach(), expected) for each in (tensor, again, shared, moved)
        ) and torch.equal(gradient, torch.ones(LARGE))

    ref = producer.make.remote(count_up, LARGE)
    assert all(ray.get([reader.run.remote(use, ref) for reader in readers]))


def test_what_was_received_is_passed_on(producer: Any, readers: list[Any]) -> None:
    def pass_on(_: Peer, tensor: torch.Tensor) -> torch.Tensor:
        tensor[0] = -1
        return tensor

    expected = count_up(None, HUGE)  # type: ignore[arg-type]
    expected[0] = -1
    ref = producer.make.remote(count_up, HUGE)
    for reader in readers[:-1]:
        ref = reader.make.remote(pass_on, ref)
    assert ray.get(readers[-1].run.remote(keep, ref)) == float(expected.double().sum())
    assert ray.get(readers[-1].run.remote(is_kept, expected))
    ray.get(readers[-1].run.remote(drop))


def test_memory_is_used_again_and_in_the_end_given_back(producer: Any, readers: list[Any]) -> None:
    for value in range(10):
        ref = producer.make.remote(lambda _, value: torch.full((HUGE,), float(value)), value)
        sums = ray.get([reader.run.remote(total, ref) for reader in readers])
        assert sums == [value * HUGE] * READERS
    del ref

    def assert_given_back() -> None:
        assert ray.get(producer.stats.remote())["files_free"] == 0

    wait_until(assert_given_back, "files are kept:")
