"""Storages that their user has declared not to change."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class FrozenStorages:
    """The frozen storages of this process, by address. Thread-safe: one step per change."""

    def __init__(self) -> None:
        self._by_address: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def add(self, storage: torch.UntypedStorage) -> None:
        """Record a storage until its memory is freed."""
        address = storage.data_ptr()
        by_address = self._by_address

        def forget(dead: weakref.ref[torch.UntypedStorage]) -> None:
            if by_address.get(address) is dead:
                del by_address[address]

        by_address[address] = weakref.ref(storage, forget)

    def contain(self, addresses: Iterable[int]) -> bool:
        """Tell whether all storages at these addresses are frozen."""
        return bool(self._by_address) and all(at in self._by_address for at in addresses)


STORAGES = FrozenStorages()


def freeze_tensors(value: Any) -> None:
    """Record the storages of all host tensors in nested dicts, lists and tuples.

    Raises:
        TypeError: The value contains something else.
    """
    import torch

    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu" and value.layout is torch.strided:
            STORAGES.add(value.untyped_storage())
    elif isinstance(value, Mapping):
        freeze_tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            freeze_tensors(item)
    else:
        raise TypeError(
            f"freeze takes tensors, and dicts, lists and tuples of them, not {type(value).__name__}"
        )
