"""What users of RDT call directly, beside Ray's own API."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ray.util.annotations import PublicAPI

if TYPE_CHECKING:
    import torch

    import ray
    from ray.experimental.rdt.manager import RDTManager

_Function = TypeVar("_Function", bound=Callable[..., Any])


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
        ValueError: by ``ray.get``, where a target does not fit or the object turns out to be none
            of RDT's; the reference stays usable.
    """
    _manager().set_targets(ref.hex(), target)


@PublicAPI(stability="alpha")
def receive_into(**tensors_of: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Lets arguments of an actor's method or a task be received into given tensors.

    Where an RDT object is passed for such a parameter, its tensors go straight into the given ones,
    and these are in the value that the function gets, as with ``set_target_for_ref``. A value that
    is no RDT object arrives as it would without.

    Args:
        **tensors_of: By name of a parameter, a function that gives the tensors, in the order in
            which those of the object were pickled; None lets this call's be new ones. It is called
            right before each fetch, in the consumer: for a method with the actor, for a task
            without arguments.

    Raises:
        ValueError: no such parameter; from the call, where a tensor does not fit its target.
        TypeError: what is decorated is no function.

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
        from ray.experimental.rdt.consumer import argument_context as arguments

        arguments.declare(function, tensors_of)
        return function

    return declare


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

    Memory, in bytes:

    * ``stored_bytes``: host memory of objects stored here; ``RAY_RDT_STORE_BYTES`` limits it
    * ``pinned_bytes``: of objects that other processes read right now
    * ``pooled_bytes``: the receive pool, made of ``pool_used`` (in tensors that were received) and
      ``pool_free`` (kept for the next; ``RAY_RDT_POOL_BYTES`` limits it)
    * ``hinted_bytes``: received before anybody asked; ``RAY_RDT_HINT_BYTES`` limits it

    Ray's metrics show these four as ``ray_rdt_stored_bytes`` and so on, for each process that uses
    RDT.

    Returns:
        Those, ``stored_objects`` (tensors that wait for consumers), ``plain_objects`` (which went
        through Ray's object store because there was no room), ``directory_rows`` (objects that it
        owns; the guards of its tasks' results among them), ``held_arguments`` (tasks that have not
        got their arguments yet), ``recipes`` (objects that it may make again), ``exposed`` (objects
        described to one-sided transports), ``streams`` (generators under way), and the agent's own:
        ``regions``, ``pinned`` (those being read), ``pulls_live``, ``calls_live``, ``connections``,
        and for each lane what came over it.
    """
    return _manager().stats()
