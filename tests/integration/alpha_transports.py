"""A transport over a collective backend of a user's, written for Ray's alpha.

In the shape of those for other accelerators: a group for ``ray.util.collective``, and a subclass of
``CollectiveTensorTransport`` that names it and prepares its device before it receives.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from ray.util.collective.collective_group.base_collective_group import BaseGroup

from ray.experimental.rdt.collective_tensor_transport import CollectiveTensorTransport

CALLS: Counter[str] = Counter()


class FolderGroup(BaseGroup):
    """Members send files to each other."""

    def __init__(self, world_size: int, rank: int, group_name: str):
        super().__init__(world_size, rank, group_name)
        self._folder = Path(tempfile.gettempdir()) / f"folder-{group_name}"
        self._folder.mkdir(exist_ok=True)
        self._numbers: Counter[str] = Counter()

    @classmethod
    def backend(cls) -> str:
        return "FOLDER"

    @classmethod
    def check_backend_availability(cls) -> bool:
        return True

    def _next(self, sender: int, receiver: int) -> Path:
        pair = f"{sender}-{receiver}"
        self._numbers[pair] += 1
        return self._folder / f"{pair}-{self._numbers[pair]}"

    def send(self, tensor: Any, options: Any) -> None:
        (mine,) = tensor
        path = self._next(self.rank, options.dst_rank)
        torch.save(mine, f"{path}.part")
        os.rename(f"{path}.part", path)

    def recv(self, tensor: Any, options: Any) -> None:
        (mine,) = tensor
        path, deadline = self._next(options.src_rank, self.rank), time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        mine.copy_(torch.load(path))
        path.unlink()

    def destroy_group(self) -> None:
        CALLS["destroyed"] += 1

    def _refuse(self, *args: Any, **options: Any) -> None:
        raise NotImplementedError

    allreduce = barrier = reduce = allgather = broadcast = reducescatter = _refuse


class FolderTransport(CollectiveTensorTransport):
    def tensor_transport_backend(self) -> str:
        return "FOLDER"

    def recv_multiple_tensors(
        self, obj_id: str, metadata: Any, communicator: Any, target_buffers: Any = None
    ) -> Any:
        CALLS["received"] += 1
        return super().recv_multiple_tensors(obj_id, metadata, communicator, target_buffers)


def register_backend() -> None:
    from ray.util.collective.backend_registry import _global_registry, register_collective_backend

    if not _global_registry.is_registered("FOLDER"):
        register_collective_backend("FOLDER", FolderGroup)
