"""What users of RDT call directly, beside Ray's own API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ray.util.annotations import PublicAPI

if TYPE_CHECKING:
    import torch

    import ray
    from ray.experimental.rdt.manager import RDTManager


def _manager() -> RDTManager:
    import ray

    manager: RDTManager = ray._private.worker.global_worker.rdt_manager
    return manager


@PublicAPI(stability="alpha")
def wait_tensor_freed(tensor: torch.Tensor, timeout: float | None = None) -> None:
    """Blocks until no RDT object uses the memory of a tensor any more.

    RDT keeps a reference to what a task returned, no copy. A task that wants to change such a
    tensor in place calls this first; then every ObjectRef to it is gone and nobody reads it.
    Another tensor over the same storage, a view for instance, counts as the same.

    Runs on: producer, any thread but an event loop's.

    Args:
        tensor: A tensor that a task of this process returned, or that it put.
        timeout: Seconds to wait, None for as long as it takes.

    Raises:
        TimeoutError: it is still in use.
    """
    _manager().store.wait_freed(tensor, timeout)


@PublicAPI(stability="alpha")
def set_target_for_ref(ref: ray.ObjectRef, target: list[Any]) -> None:
    """Lets ``ray.get`` of an RDT object in this process receive into given tensors.

    They replace the tensors in the value, in the order in which these were pickled; a list of
    tensors keeps its order. They need not be contiguous. A later call replaces an earlier one.
    They serve every ``ray.get`` while they live; RDT keeps them alive until the first.

    Args:
        ref: The object.
        target: As many tensors as the object has, of the same shapes and dtypes.

    Raises:
        ValueError: by ``ray.get``, where a target does not fit; the reference stays usable.
    """
    _manager().set_targets(ref.hex(), target)


@PublicAPI(stability="alpha")
def set_target_device_for_ref(ref: ray.ObjectRef, target_device: str) -> None:
    """Lets ``ray.get`` of an RDT object in this process put its tensors on another device.

    A later call, or one of ``set_target_for_ref``, replaces an earlier one.

    Args:
        ref: The object.
        target_device: A torch device, ``"cpu"`` or ``"cuda:1"`` for instance.
    """
    _manager().set_target_device(ref.hex(), target_device)


@PublicAPI(stability="alpha")
def stats() -> dict[str, int]:
    """Counters of this process's part in RDT.

    Returns:
        ``stored_objects``, ``directory_rows`` and the agent's own: regions, connections, pool.
    """
    return _manager().stats()
