"""What is handed over again and again moves to huge pages, and stays what it was."""

from __future__ import annotations

import ctypes
import mmap
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


@ray.remote(num_cpus=0)
class Keeper:
    """Has a tensor of pages of 4 KiB, to give away or to receive into."""

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
        """How much of the tensor lies on huge pages: of the mapping that it is in."""
        address = self._tensor.data_ptr()
        is_in = False
        for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
            bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
            if bounds:
                is_in = int(bounds[1], 16) <= address < int(bounds[2], 16)
            elif is_in and line.startswith("AnonHugePages:"):
                return int(line.split()[1]) << 10
        raise AssertionError("the tensor is in no mapping")


@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_both_ends_move_there(local_ray: None, transport: str) -> None:
    producer, consumer = Keeper.remote(), Keeper.remote()
    for value in range(1, HAND_OVERS + 1):
        ref = getattr(producer, f"by_{transport}").remote()
        assert ray.get(consumer.receive.remote([ref])) == (value, value)
        del ref
    for end in (producer, consumer):
        wait_until(
            lambda end=end: ray.get(end.huge_bytes.remote()) >= COUNT * 4 // 2, "it has moved"
        )
