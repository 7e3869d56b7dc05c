"""Where users want the tensors of objects that this process will get.

A user's tensors are kept until they have received the object once; from then on they are held
weakly, since a borrower is not told when an object's last reference is gone: as soon as one of them
dies, the object's wish is void. A wish that does not fit is void once its error was raised, so that
the reference stays usable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt._tensors import check_storage
from ray.experimental.rdt.common import real_threads as threading

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt._tensors import Table


@dataclass(frozen=True)
class Target:
    """Where the user wants an object's tensors.

    Attributes:
        tensors: Tensors to receive into, None for new ones.
        device: The device for new ones, None for the producer's.
    """

    tensors: Sequence[torch.Tensor] | None = None
    device: str | None = None


ANYWHERE = Target()

#: Gives the target, None if a tensor of it has died.
_Wish = Callable[[], "Target | None"]


class Targets:
    """The wishes of one process by object id (hex). Runs on: any thread; never blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wishes: dict[str, _Wish] = {}

    def __len__(self) -> int:
        return len(self._wishes)

    def refuse_plain(self, object_id: str) -> None:
        """Raises ValueError if the user wants the tensors of this object, which has none."""
        wish = self._wishes.get(object_id)
        target = wish() if wish is not None else None
        if target is not None and target.tensors:
            self.forget(object_id)
            raise ValueError(
                f"set_target_for_ref was called for ObjectRef({object_id}), which is not an RDT "
                "object: its value has no tensors that RDT carries"
            )

    def set_tensors(self, object_id: str, tensors: Sequence[torch.Tensor]) -> None:
        """Replaces an earlier wish. Raises ValueError for what cannot receive a tensor."""
        _check_kinds(tensors)
        self._set(object_id, _hold(Target(tensors=list(tensors))))

    def set_device(self, object_id: str, device: str) -> None:
        """Replaces an earlier wish. Raises ValueError for what is no name of a device."""
        import torch

        try:
            torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"target device {device!r}: {error}") from None
        self._set(object_id, _hold(Target(device=device)))

    def _set(self, object_id: str, wish: _Wish) -> None:
        with self._lock:
            self._wishes = {key: other for key, other in self._wishes.items() if other()}
            self._wishes[object_id] = wish

    def of(self, object_id: str, table: Table) -> Target:
        """The target of an object with this layout.

        Raises:
            ValueError: the user's tensors do not fit; their wish is void from now on.
        """
        wish = self._wishes.get(object_id)
        target = wish() if wish is not None else None
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
        """Notes that an object is in its target."""
        if target.tensors is None:
            return
        with self._lock:
            wish = self._wishes.get(object_id)
            if wish is not None and wish() is target:
                self._wishes[object_id] = _hold_weakly(target.tensors)

    def forget(self, object_id: str) -> None:
        with self._lock:
            self._wishes.pop(object_id, None)

    def clear(self) -> None:
        with self._lock:
            self._wishes.clear()


def _hold(target: Target) -> _Wish:
    return lambda: target


def _hold_weakly(tensors: Sequence[torch.Tensor]) -> _Wish:
    from torch.utils.weak import TensorWeakRef

    held = [TensorWeakRef(tensor) for tensor in tensors]

    def wish() -> Target | None:
        alive = [tensor for tensor in (each() for each in held) if tensor is not None]
        return Target(tensors=alive) if len(alive) == len(held) else None

    return wish


def into(tensors: Sequence[torch.Tensor], table: Table) -> Target:
    """A target that is meant once. Raises ValueError where it does not fit the object."""
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
    """Raises ValueError unless the targets match the object's tensors one to one.

    Nor may one reach beyond its storage: the lanes write where it says that its memory is.
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
