"""Public functions for the nixl transport. Each acts on the calling process.

If nixl cannot be used, for example because it is not installed, each function logs a warning. With
``RAY_RDT_STRICT_TRANSPORT=1`` it raises an error instead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.api import current_manager
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.transports.base import TransportUnavailable
from ray.experimental.rdt.transports.nixl.engine import NixlError

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.transports.nixl.transport import NixlTransport

logger = logging.getLogger("ray.rdt")


def nixl_transport() -> NixlTransport:
    """Return the nixl transport of this process. Raises TransportUnavailable."""
    return cast("NixlTransport", current_manager().transport("nixl"))


def _wherever_nixl_is(act: Callable[[NixlTransport], None], what: str) -> None:
    """Call a function with this process's nixl transport, or log why it is unavailable.

    A named transport is preferred, not required. The fallback lanes need none of these calls.

    Raises:
        TransportUnavailable: nixl cannot be used, and ``RAY_RDT_STRICT_TRANSPORT=1``. If nixl is
            not installed, the error is also an ImportError.
        NixlError: nixl cannot use this memory, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """
    try:
        act(nixl_transport())
    except (TransportUnavailable, NixlError) as error:
        if settings().strict_transport:
            raise
        logger.warning("%s had no effect in this process: %s. RDT falls back.", what, error)


@PublicAPI(stability="alpha")
def register_nixl_memory(tensor: torch.Tensor) -> None:
    """Register a tensor's memory with nixl and keep it registered.

    Without this call, RDT registers memory when an object is first pulled, and large tensors stay
    registered while they live. This function registers the whole storage ahead of time, for small
    tensors as well. The registration ends when the storage dies or when ``deregister_nixl_memory``
    has been called as often as this function. Objects made of the tensor or of its views use this
    registration and not the memory pool.

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
    """Undo one call of ``register_nixl_memory`` for this tensor's memory.

    The memory stays registered until both functions have been called equally often. RDT objects
    that have been pulled keep the memory registered until they are freed. If the memory is not
    registered, the function logs a warning and does nothing else.

    Args:
        tensor: A tensor whose storage is registered.
    """

    def deregister(nixl: NixlTransport) -> None:
        try:
            nixl.deregister_memory(tensor)
        except ValueError as error:
            logger.warning("deregister_nixl_memory does nothing: %s", error)

    _wherever_nixl_is(deregister, "deregister_nixl_memory")


@PublicAPI(stability="alpha")
def register_nixl_memory_pool(size: int, device: torch.device) -> None:
    """Create a pool of registered memory and copy this process's nixl objects into it.

    A pool is registered once, and on many networks a copy costs less than a registration. RDT
    copies an object when it is put or returned. The program may then overwrite its tensors, and
    consumers receive the copies. Tensors that share memory are copied once. The producing process
    itself gets its own tensors. The pool memory is released when the last ObjectRef is gone.

    RDT does not copy objects that contain memory registered by ``register_nixl_memory``. A pool on
    a GPU takes only objects whose tensors are all on that GPU. A pool on the CPU takes tensors on
    GPUs as well.

    If the pool is full, the put or return waits as it does at ``RAY_RDT_STORE_BYTES``. Then the
    object goes through Ray's object store. If nixl cannot be used, the copies are sent over a
    fallback lane.

    Copies of GPU tensors run after the work that the current stream has at that time, and before
    its later work. With a pool on the CPU, the put waits for these copies. After
    ``set_nixl_cuda_stream(None)``, the put also waits for all work on the devices.

    Args:
        size: Size of the pool in bytes.
        device: Device of the pool, for example ``torch.device("cpu")``.

    Raises:
        ValueError: This process has a pool already, or the size is not positive.
        NixlOutOfMemoryError: Raised by a put or return if the pool stays full and either the
            object has tensors on devices or ``RAY_RDT_STRICT_TRANSPORT=1``.
        ImportError: nixl is not installed, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """
    memory = current_manager().producer.snapshots.make_pool(size, device)
    _wherever_nixl_is(
        lambda nixl: nixl.register_memory(memory), "Registering a memory pool with nixl"
    )


@PublicAPI(stability="alpha")
def set_nixl_cuda_stream(stream: torch.cuda.Stream | None) -> None:
    """Set the CUDA stream that writes the tensors that this process sends over nixl.

    A pull always waits for the work that the current stream had when the object was created. With
    this call it also waits for the work that the given stream had at that time. The setting applies
    to all objects created after the call. If an object has tensors on another device than the
    stream, its first pull fails with a ValueError.

    Args:
        stream: The stream. With None, the first pull of each object waits until the devices of its
            tensors have finished all work, including work queued after the object was created.

    Raises:
        ImportError: nixl is not installed, and ``RAY_RDT_STRICT_TRANSPORT=1``.
    """
    _wherever_nixl_is(lambda nixl: nixl.set_cuda_stream(stream), "set_nixl_cuda_stream")
