"""What users of the nixl transport call directly. Each acts on the process that calls it.

Where nixl cannot be used, because it is not installed for instance, they are no error but a line in
the log, unless ``RAY_RDT_STRICT_TRANSPORT=1``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.nixl.engine import NixlError

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.manager import RDTManager
    from ray.experimental.rdt.transports.nixl.transport import NixlTransport


logger = logging.getLogger("ray.rdt")


def _manager() -> RDTManager:
    import ray

    manager: RDTManager = ray._private.worker.global_worker.rdt_manager
    return manager


def _wherever_nixl_is(act: Callable[[NixlTransport], None], what: str) -> None:
    """Does something with this process's transport. Where nixl cannot be used, says so instead.

    A program names nixl as a wish: without it the best other lane serves, and needs none of this.

    Raises:
        TransportUnavailable: nixl cannot be used, and ``RAY_RDT_STRICT_TRANSPORT=1``; also an
            ImportError where it is not installed.
        NixlError: it cannot use this memory, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """
    try:
        act(cast("NixlTransport", _manager().transport("nixl")))
    except (TransportUnavailable, NixlError) as error:
        if settings().strict_transport:
            raise
        logger.warning(
            "%s does nothing in this process: %s. The best other lane is used.", what, error
        )


@PublicAPI(stability="alpha")
def register_nixl_memory(tensor: torch.Tensor) -> None:
    """Registers a tensor's memory with nixl and keeps it registered.

    RDT registers memory by itself when an object is first pulled, and large tensors stay
    registered while they live. This function does it ahead of time, for small tensors too: the
    whole storage is registered until ``deregister_nixl_memory`` has been called as often, or the
    storage dies. Objects made of it, or of views of it, use this registration and no memory pool.

    Args:
        tensor: A tensor on the CPU or a GPU.

    Raises:
        ImportError: nixl is not installed, and ``RAY_RDT_STRICT_TRANSPORT=1``.

    Example:
        .. code-block:: python

            @ray.remote
            class Trainer:
                def __init__(self):
                    self.weights = torch.randn(1000, 1000)
                    register_nixl_memory(self.weights)

                def rows(self):
                    return ray.put(list(self.weights), _tensor_transport="nixl")
    """
    _wherever_nixl_is(lambda nixl: nixl.register_memory(tensor), "register_nixl_memory")


@PublicAPI(stability="alpha")
def deregister_nixl_memory(tensor: torch.Tensor) -> None:
    """Undoes one ``register_nixl_memory`` of this tensor's memory.

    After as many calls of both the memory is no longer registered, unless RDT objects made of it
    have been pulled: these keep it registered until they are gone. For memory that is not
    registered it does nothing, and says so in the log.

    Args:
        tensor: A tensor whose storage was registered.
    """

    def deregister(nixl: NixlTransport) -> None:
        try:
            nixl.deregister_memory(tensor)
        except ValueError as error:
            logger.warning("deregister_nixl_memory does nothing: %s", error)

    _wherever_nixl_is(deregister, "deregister_nixl_memory")


@PublicAPI(stability="alpha")
def register_nixl_memory_pool(size: int, device: torch.device) -> None:
    """Makes a pool of registered memory that this process's objects over nixl are copied into.

    A copy costs less than a registration on many networks, and a pool registers once. An object is
    copied when it is put or returned: the program may overwrite its tensors then, and consumers get
    what they were. Tensors that share memory are copied once. Tensors in this process's own value
    stay the program's. The room is free again when the last ObjectRef has gone.

    Not copied, but sent from where they are: objects with memory that the user has registered, and
    objects with tensors elsewhere than on a pool's GPU. A pool on the CPU takes tensors of GPUs.

    Is the pool full, the put or return waits as it does at ``RAY_RDT_STORE_BYTES``; then the object
    goes through Ray's object store. Where nixl cannot be used, the pool's copies go over the best
    other lane.

    On a GPU the copy is queued on the current stream, and the put waits for no more than the GPU to
    have finished what it was given; with ``set_nixl_cuda_stream`` for nothing.

    Args:
        size: Bytes of the pool.
        device: Where it is, for instance ``torch.device("cpu")``.

    Raises:
        ValueError: this process has a pool already, or the size is not above 0.
        NixlOutOfMemoryError: by a put or return, where the pool stays full and the object has
            tensors on devices, or ``RAY_RDT_STRICT_TRANSPORT=1``.
        ImportError: nixl is not installed, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """
    memory = _manager().make_nixl_pool(size, device)
    _wherever_nixl_is(
        lambda nixl: nixl.register_memory(memory), "Registering a memory pool with nixl"
    )


@PublicAPI(stability="alpha")
def set_nixl_cuda_stream(stream: torch.cuda.Stream | None) -> None:
    """Says which CUDA stream writes the tensors that this process sends over nixl.

    The bytes of a tensor are read after what the current stream has when the object is made. With a
    stream set they are also read after what that stream has then. It holds for all objects that are
    made after the call; the first pull of one with tensors on another device than the stream's
    fails with a ValueError.

    Args:
        stream: The stream; None makes each first pull wait until the tensors' devices have finished
            everything, also what they were given after the object was made.

    Raises:
        ImportError: nixl is not installed, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """
    _wherever_nixl_is(lambda nixl: nixl.set_cuda_stream(stream), "set_nixl_cuda_stream")
