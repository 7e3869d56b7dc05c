"""Public functions of RDT in addition to Ray's own API."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.common import ray_core

if TYPE_CHECKING:
    import torch

    import ray
    from ray.experimental.rdt.manager import RDTManager

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Value = TypeVar("_Value")


def current_manager() -> RDTManager:
    """Return the manager of this process."""
    manager: RDTManager = ray_core.manager()
    return manager


@PublicAPI(stability="alpha")
def wait_tensor_freed(tensor: torch.Tensor, timeout: float | None = None) -> None:
    """Block until no RDT object uses the memory of a tensor.

    RDT keeps a reference to a returned tensor and no copy. Call this function before you change
    such a tensor in place. When it returns, no ObjectRef to the tensor exists and no transfer reads
    it. Tensors over the same storage, such as views, count as the same tensor.

    Runs on: producer, any thread except that of an event loop.

    Args:
        tensor: A tensor that a task of this process returned or that this process put.
        timeout: Seconds to wait. None waits without a limit.

    Raises:
        TimeoutError: The tensor is still in use.
    """
    current_manager().producer.store.wait_freed(tensor, timeout)


@PublicAPI(stability="alpha")
def freeze(value: _Value) -> _Value:
    """Declare that host tensors will not change any more, so that consumers need no copy.

    If a frozen tensor was received from a process of this host, or was created under
    ``shareable``, consumers of this host map its memory. All other transfers are not affected.
    RDT does not prevent writes. If you write to a frozen tensor, consumers may get the old or the
    new bytes. With ``RAY_RDT_CHECKSUM=1`` they raise ``RDTChecksumError`` if these differ from the
    bytes of the first verified pull.

    Runs on: producer, any thread. Call it before the tensors are returned or put.

    Args:
        value: A tensor, or a nested dict, list or tuple of tensors. Views freeze the whole storage.

    Returns:
        The value.

    Raises:
        TypeError: The value contains something else.
    """
    from ray.experimental.rdt.producer.frozen import freeze_tensors

    freeze_tensors(value)
    return value


@PublicAPI(stability="alpha")
def shareable() -> AbstractContextManager[Any]:
    """Return a context in which new host tensors are in memory that other processes can map.

    It affects torch's factory functions, ``clone``, ``to``, ``contiguous`` and ``cpu``, in the
    thread that enters it. Results of other functions are ordinary tensors. Tensors share files of
    64 MiB: a file is freed with its last tensor. Such a tensor cannot be resized. Child processes
    that are forked see the parent's writes to it and the parent sees theirs.

    To let consumers map the tensors without a copy, also call ``freeze``.

    Example:
        .. code-block:: python

            with ray.experimental.rdt.shareable():
                weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            ref = ray.put(ray.experimental.rdt.freeze(weights), _tensor_transport="auto")
    """
    from ray.experimental.rdt.producer.shareable import Shareable

    return Shareable(current_manager().producer.allocate_shareable)


@PublicAPI(stability="alpha")
def set_target_for_ref(ref: ray.ObjectRef, target: list[Any]) -> None:
    """Make ``ray.get`` of an RDT object in this process receive into the given tensors.

    The targets replace the tensors of the value in pickling order, which for a list is the order
    of the list. Targets do not have to be contiguous. A later call replaces an earlier one. RDT
    keeps the targets alive until the first ``ray.get`` and holds weak references afterwards.

    Args:
        ref: The object.
        target: One tensor for each tensor of the object, with the same shape and dtype.

    Raises:
        ValueError: Raised by ``ray.get`` if a target does not fit or the object is not an RDT
            object. The reference stays usable.
    """
    current_manager().consumer.targets.set_tensors(ref.hex(), target)


@PublicAPI(stability="alpha")
def receive_into(**tensors_of: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Receive arguments of an actor method or a task into given tensors.

    If an RDT object is passed for a declared parameter, its tensors are received into the targets.
    The value that the function gets holds the targets, as with ``set_target_for_ref``. Other
    values arrive as they do without this decorator.

    Args:
        **tensors_of: For each parameter name, a function that returns the targets in pickling
            order. If it returns None, this call receives new tensors. The consumer calls it before
            each fetch: for a method with the actor instance, for a task without arguments.

    Raises:
        ValueError: The function has no such parameter. The call itself raises ValueError if a
            tensor does not fit its target.
        TypeError: The decorated object is not a function.

    Example:
        .. code-block:: python

            @ray.remote
            class Generator:
                def __init__(self):
                    self.model = make_model()

                @ray.experimental.rdt.receive_into(
                    weights=lambda self: self.model.state_dict().values()
                )
                def update(self, weights):
                    assert weights["bias"].data_ptr() == self.model.bias.data_ptr()

            generator.update.remote(trainer.state_dict.remote())
    """

    def declare(function: _Function) -> _Function:
        from ray.experimental.rdt.consumer import argument_context

        argument_context.declare(function, tensors_of)
        return function

    return declare


@PublicAPI(stability="alpha")
def set_target_device_for_ref(ref: ray.ObjectRef, target_device: str) -> None:
    """Make ``ray.get`` of an RDT object in this process put its tensors on the given device.

    A later call, or a later call of ``set_target_for_ref``, replaces an earlier one.

    Args:
        ref: The object.
        target_device: A torch device such as ``"cpu"`` or ``"cuda:1"``.
    """
    current_manager().consumer.targets.set_device(ref.hex(), target_device)


@PublicAPI(stability="alpha")
def stats() -> dict[str, int]:
    """Return the RDT counters of this process.

    Memory, in bytes:

    * ``stored_bytes``: host memory of stored objects; ``RAY_RDT_STORE_BYTES`` limits it
    * ``pinned_bytes``: memory that other processes are reading
    * ``pooled_bytes``: the receive pool, the sum of ``pool_used`` (in received tensors) and
      ``pool_free`` (kept for reuse; ``RAY_RDT_POOL_BYTES`` limits it)
    * ``hinted_bytes``: memory of prefetched objects; ``RAY_RDT_HINT_BYTES`` limits it

    Ray's metrics show these four for each process that uses RDT, under names such as
    ``ray_rdt_stored_bytes``.

    Objects and tasks:

    * ``stored_objects``: objects whose tensors this process holds
    * ``plain_objects``: objects that went through Ray's object store because the store was full
    * ``directory_rows``: objects that this process owns, including those behind task results
    * ``held_arguments``: submitted tasks whose arguments are kept for them
    * ``recipes``: objects that this process can reconstruct
    * ``exposed``: objects described to one-sided transports
    * ``streams``: generators in progress

    Returns:
        All of the above and the counters of the agent: ``regions``, ``pinned`` (regions being
        read), ``pulls_live``, ``calls_live``, ``connections``, ``bytes_granted`` (sent on any
        lane), and for each lane the received pulls and bytes, such as ``bytes_in_cma``.
    """
    return current_manager().stats()
