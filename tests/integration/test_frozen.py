"""Tensors that do not change any more reach consumers of the host without a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ray
from ray.experimental.rdt import freeze, shareable
from tests.integration.peers import LARGE, Peer, count_up, pulls, total

HUGE = 16 * LARGE  # 16 MiB
EXPECTED = HUGE * (HUGE - 1) / 2


def keep(peer: Peer, value: Any) -> None:
    peer.kept["value"] = value


def checksum_failure(peer: Peer, ref: list[ray.ObjectRef]) -> str:
    try:
        ray.get(ref[0])
    except ray.exceptions.RayError as error:
        return type(error).__name__
    return ""


def in_file(peer: Peer) -> int:
    """The bytes of this process's mappings of RDT's files."""
    with open("/proc/self/maps") as file:
        ranges = [line.split()[0].split("-") for line in file if "/memfd:rdt" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in ranges)


def test_shareable_tensors_are_mapped_by_one_reader_too(producer: Any, consumer: Any) -> None:
    def make(peer: Peer) -> dict[str, torch.Tensor]:
        with shareable():
            peer.kept["large"] = count_up(peer, HUGE).clone()
            peer.kept["small"] = torch.ones(1000)
        return freeze({name: peer.kept[name] for name in ("large", "small")})

    def use(peer: Peer, value: dict[str, torch.Tensor]) -> tuple[float, float]:
        value["small"] += 1
        return float(value["large"].double().sum()), float(value["small"].sum())

    before = pulls(consumer)["map"]
    ref = producer.make.remote(make)
    assert ray.get(consumer.run.remote(use, ref)) == (EXPECTED, 2000)
    assert ray.get(consumer.run.remote(use, ref)) == (EXPECTED, 2000)
    assert pulls(consumer)["map"] == before + 2
    ray.get(producer.run.remote(lambda peer: peer.kept.clear()))


def test_received_tensors_are_passed_on_without_a_copy(spawn: Any, producer: Any) -> None:
    middle, *readers = [spawn() for _ in range(4)]

    def pass_on(peer: Peer) -> torch.Tensor:
        return freeze(peer.kept["value"])

    ref = producer.make.remote(count_up, HUGE)
    ray.get([middle.run.remote(keep, ref), *(r.run.remote(total, ref) for r in readers)])
    # The producer has learned that several read such objects: the next one is in a file.
    ref = producer.make.remote(count_up, HUGE)
    ray.get(middle.run.remote(keep, ref))
    assert ray.get(middle.run.remote(in_file)) >= 4 * HUGE
    passed = middle.make.remote(pass_on)
    before = [pulls(reader)["map"] for reader in readers]
    ray.get([reader.run.remote(keep, passed) for reader in readers])
    assert [pulls(reader)["map"] for reader in readers] == [count + 1 for count in before]
    del ref, passed
    ray.get(middle.run.remote(lambda peer: peer.kept.clear()))
    for _ in range(4):  # new objects, which could use the same memory
        ray.get(readers[0].run.remote(total, producer.make.remote(torch_zeros)))

    def sum_kept(peer: Peer) -> float:
        return float(peer.kept["value"].double().sum())

    assert ray.get([reader.run.remote(sum_kept) for reader in readers]) == [EXPECTED] * 3


def torch_zeros(peer: Peer) -> torch.Tensor:
    return torch.zeros(HUGE)


def test_a_frozen_tensor_that_changed_is_found_by_checksums(spawn: Any, producer: Any) -> None:
    checks = spawn(Peer, runtime_env={"env_vars": {"RAY_RDT_CHECKSUM": "1"}})

    def make(peer: Peer) -> torch.Tensor:
        with shareable():
            peer.kept["frozen"] = torch.ones(HUGE)
        return freeze(peer.kept["frozen"])

    ref = producer.make.remote(make)
    assert ray.get(checks.run.remote(checksum_failure, [ref])) == ""
    ray.get(producer.run.remote(lambda peer: peer.kept["frozen"].zero_() is None))
    assert ray.get(checks.run.remote(checksum_failure, [ref])) == "RDTChecksumError"
    ray.get(producer.run.remote(lambda peer: peer.kept.clear()))


def test_what_freeze_and_shareable_take(local_ray: None) -> None:
    with pytest.raises(TypeError, match="not str"):
        freeze({"name": "text"})
    nested = {"a": [torch.ones(2), (torch.ones(3),)]}
    assert freeze(nested) is nested
    outside = torch.ones(1 << 20)
    with shareable():
        inside = [
            torch.arange(1 << 20),
            torch.empty(3, 5, dtype=torch.bfloat16),
            outside.clone(),
            torch.ones(1024, 1024).t().contiguous(),
            torch.nn.Linear(600, 600).weight,
            torch.ones(4, requires_grad=True),
            torch.tensor([]),
            torch.tensor(5.0),
            torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
        ]
        assert outside.to(torch.float32) is outside
        view = outside.view(-1).contiguous()
    assert view.data_ptr() == outside.data_ptr()
    assert torch.equal(inside[0], torch.arange(1 << 20))
    assert torch.equal(inside[2], outside)
    assert torch.equal(inside[3], torch.ones(1024, 1024))
    assert isinstance(inside[4], torch.nn.Parameter)
    assert inside[5].requires_grad
    assert inside[5].is_leaf
    assert inside[7] == 5
    assert inside[8].is_contiguous(memory_format=torch.channels_last)
    refs = [ray.put(tensor.detach(), _tensor_transport="auto") for tensor in inside]
    assert all(torch.equal(ray.get(ref), t.detach()) for ref, t in zip(refs, inside))
