"""New tensors of producers, and what is transferred repeatedly, are on huge pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from pathlib import Path

import pytest
import torch

import ray
from tests.support import wait_until

COUNT = (32 << 20) // 4
HAND_OVERS = 4
MADV_COLLAPSE = 25


def can_collapse() -> bool:
    """Whether memory gets huge pages if asked for and not otherwise, and a kernel from 6.1."""
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists():
        return False
    with mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[:] = bytes(len(memory))
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        failed = ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(len(memory)), MADV_COLLAPSE
        )
    return not failed and "[madvise]" in mode.read_text(encoding="ascii")


pytestmark = pytest.mark.skipif(
    not can_collapse(), reason="this system does not collapse memory, or gives huge pages unasked"
)


#: torch's own setting: its memory begins on pages of 4 KiB.
SMALL_PAGES = {"env_vars": {"THP_MEM_ALLOC_ENABLE": "0"}}


def huge_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes on huge pages of the mapping that the tensor is in."""
    address = tensor.data_ptr()
    is_in = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            is_in = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif is_in and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the tensor is in no mapping")


@ray.remote(num_cpus=0)
class Keeper:
    """Has a tensor to give away or to receive into."""

    def __init__(self) -> None:
        self._tensor = torch.zeros(COUNT)

    @ray.method(tensor_transport="auto")
    def by_auto(self) -> torch.Tensor:
        return self._tensor.fill_(self._tensor[0] + 1)

    @ray.method(tensor_transport="gloo")
    def by_gloo(self) -> torch.Tensor:
        return self._tensor.fill_(self._tensor[0] + 1)

    def receive(self, refs: list[ray.ObjectRef]) -> tuple[float, float]:
        ray.experimental.set_target_for_ref(refs[0], [self._tensor])
        received = ray.get(refs[0])
        assert received.data_ptr() == self._tensor.data_ptr()
        return float(received.min()), float(received.max())

    def huge_bytes(self) -> int:
        return huge_bytes(self._tensor)

    def setting(self) -> str | None:
        return os.environ.get("THP_MEM_ALLOC_ENABLE")


@ray.remote(num_cpus=0)
class WithoutTransport:
    def huge_bytes(self) -> int:
        return huge_bytes(torch.zeros(COUNT))


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_both_ends_move_there(local_ray: None, transport: str) -> None:
    make = Keeper.options(runtime_env=SMALL_PAGES).remote
    producer, consumer = make(), make()
    assert ray.get([end.huge_bytes.remote() for end in (producer, consumer)]) == [0, 0]
    for value in range(1, HAND_OVERS + 1):
        ref = getattr(producer, f"by_{transport}").remote()
        assert ray.get(consumer.receive.remote([ref])) == (value, value)
        del ref
    for end in (producer, consumer):
        wait_until(
            lambda end=end: ray.get(end.huge_bytes.remote()) >= COUNT * 4 // 2, "it has moved"
        )


def test_new_tensors_are_on_huge_pages_if_the_class_has_a_transport(local_ray: None) -> None:
    ours, others = Keeper.remote(), WithoutTransport.remote()
    assert ray.get(ours.huge_bytes.remote()) >= COUNT * 4 // 2
    assert ray.get(ours.setting.remote()) is None
    assert ray.get(others.huge_bytes.remote()) == 0
