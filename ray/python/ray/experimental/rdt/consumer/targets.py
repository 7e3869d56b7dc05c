"""Targets: the tensors or devices that the user chose to receive objects into.

Target tensors are held strongly until they have received the object once, and weakly afterwards: a
borrower is not told when the last reference of an object is gone. The target is cleared as soon as
one of the tensors dies. A target that does not fit is cleared once its error is raised, so that the
reference stays usable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt._tensors import Table, check_storage
from ray.experimental.rdt.common import real_threads as threading

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Target:
    """The place that the user chose for an object's tensors.

    Attributes:
        tensors: Tensors to receive into, None for new ones.
        device: The device for new ones, None for the producer's.
    """

    tensors: Sequence[torch.Tensor] | None = None
    device: str | None = None


ANYWHERE = Target()

#: Returns the target, None if one of its tensors has died.
_TargetRef = Callable[[], "Target | None"]


class Targets:
    """The targets of one process by object ID (hex). Runs on: any thread; never blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refs: dict[str, _TargetRef] = {}

    def __len__(self) -> int:
        return len(self._refs)

    def refuse_plain(self, object_id: str) -> None:
        """Raise ValueError if this object, which has no tensors, has target tensors."""
        ref = self._refs.get(object_id)
        target = ref() if ref is not None else None
        if target is not None and target.tensors:
            self.forget(object_id)
            raise ValueError(
                f"set_target_for_ref was called for ObjectRef({object_id}), which is not an RDT "
                "object: its value has no tensors that RDT carries"
            )

    def set_tensors(self, object_id: str, tensors: Sequence[torch.Tensor]) -> None:
        """Set the target tensors. Raises ValueError for one that cannot receive a tensor."""
        _check_kinds(tensors)
        self._set(object_id, Target(tensors=list(tensors)))

    def set_device(self, object_id: str, device: str) -> None:
        """Set the target device. Raises ValueError for an unknown device name."""
        import torch

        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"target device {device!r}: {error}") from None
        self._set(object_id, Target(device=device))

    def _set(self, object_id: str, target: Target) -> None:
        with self._lock:
            self._refs = {key: other for key, other in self._refs.items() if other()}
            self._refs[object_id] = lambda: target

    def of(self, object_id: str, table: Table) -> Target:
        """Return the target of an object with this layout.

        Raises:
            ValueError: The target tensors do not fit. The target is cleared.
        """
        ref = self._refs.get(object_id)
        target = ref() if ref is not None else None
        if target is None:
            return ANYWHERE
        try:
            if target.tensors is not None:
                check_targets(table, target.tensors)
        except ValueError:
            self.forget(object_id)
            raise
        return target

    def received(self, object_id: str, target: Target) -> None:
        """Record that an object has arrived in its target."""
        if target.tensors is None:
            return
        with self._lock:
            ref = self._refs.get(object_id)
            if ref is not None and ref() is target:
                self._refs[object_id] = _hold_weakly(target.tensors)

    def forget(self, object_id: str) -> None:
        with self._lock:
            self._refs.pop(object_id, None)

    def clear(self) -> None:
        with self._lock:
            self._refs.clear()


def _hold_weakly(tensors: Sequence[torch.Tensor]) -> _TargetRef:
    from torch.utils.weak import TensorWeakRef

    held = [TensorWeakRef(tensor) for tensor in tensors]

    def ref() -> Target | None:
        alive = [tensor for tensor in (each() for each in held) if tensor is not None]
        return Target(tensors=alive) if len(alive) == len(held) else None

    return ref


def into(tensors: Sequence[torch.Tensor], table: Table) -> Target:
    """Return a target for one fetch. Raises ValueError if it does not fit the object."""
    _check_kinds(tensors)
    check_targets(table, tensors)
    return Target(tensors=tensors)


def _check_kinds(tensors: Sequence[Any]) -> None:
    import torch

    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"target {index} is a {type(tensor).__name__}, not a torch.Tensor")
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise ValueError(
                f"target {index} is a tensor of layout {tensor.layout} on device {tensor.device}, "
                "which has no memory to receive into"
            )


def check_targets(table: Table, targets: Sequence[torch.Tensor]) -> None:
    """Raise ValueError unless the targets match the object's tensors one to one.

    A target that reaches beyond its storage is refused, too: the lanes write to its address range.
    """
    if len(targets) != len(table.rows):
        raise ValueError(
            f"{len(targets)} target tensors were given, the object has {len(table.rows)}"
        )
    for index, (target, row) in enumerate(zip(targets, table.rows)):
        _, _, dtype, shape, _, _ = row
        for what, got, expected in (
            ("shape", tuple(target.shape), tuple(shape)),
            ("dtype", target.dtype, dtype),
        ):
            if got != expected:
                raise ValueError(
                    f"target {index} has {what} {got}, the object's tensor has {expected}"
                )
        try:
            check_storage(target)
        except ValueError as error:
            raise ValueError(f"target {index} has no memory to receive into: {error}") from None
