"""The tensor store under the names that Ray's own tests use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.common.location import Location
    from ray.experimental.rdt.producer.producer import Producer


class StoreByObjectId:
    """The tensors of one producer by object id (hex)."""

    def __init__(self, producer: Producer):
        self._producer = producer
        self._store = producer.store

    def has_object(self, object_id: str) -> bool:
        return self._store.by_id(object_id) is not None

    def has_tensor(self, tensor: torch.Tensor) -> bool:
        try:
            self._store.wait_freed(tensor, 0)
        except TimeoutError:
            return True
        return False

    def get_num_objects(self) -> int:
        return len(self._store)

    def wait_and_get_object(
        self, object_id: str, timeout: float | None = None
    ) -> list[torch.Tensor]:
        return self._store.wait_object(object_id, timeout).captured.tensors

    def add_object_primary(
        self, object_id: str, tensors: list[torch.Tensor], transport: str
    ) -> Location:
        return self._producer.put_tensors(object_id, tensors, transport)

    def pop_object(self, object_id: str) -> list[torch.Tensor]:
        stored = self._store.by_id(object_id)
        if stored is None:
            raise KeyError(f"RDT object {object_id} is not stored here")
        self._producer.release(stored.key)
        return stored.captured.tensors
