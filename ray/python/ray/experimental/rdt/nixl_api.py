"""What users of the nixl transport call directly. Each acts on the process that calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ray.util.annotations import PublicAPI

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.transports.nixl import NixlTransport


def _transport() -> NixlTransport:
    """The transport of this process's session. Raises TransportUnavailable, also an ImportError."""
    import ray

    manager = ray._private.worker.global_worker.rdt_manager
    return cast("NixlTransport", manager.transport("nixl"))


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
        ImportError: nixl is not installed in this process's environment.

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
    _transport().register_memory(tensor)


@PublicAPI(stability="alpha")
def deregister_nixl_memory(tensor: torch.Tensor) -> None:
    """Undoes one ``register_nixl_memory`` of this tensor's memory.

    After as many calls of both the memory is no longer registered, unless RDT objects made of it
    have been pulled: these keep it registered until they are gone.

    Args:
        tensor: A tensor whose storage was registered.

    Raises:
        ValueError: it is not registered.
    """
    _transport().deregister_memory(tensor)


@PublicAPI(stability="alpha")
def register_nixl_memory_pool(size: int, device: torch.device) -> None:
    """Makes a pool of registered memory that RDT objects of this process are copied into.

    A copy costs less than a registration on many networks, and a pool registers once. An object is
    copied when it is first pulled over nixl, and leaves the pool when its last ObjectRef goes. Is
    the pool full, the pull waits for room. An object that is larger than the whole pool, on another
    GPU than the pool, or in memory that a user has registered, is sent from where it is.

    Args:
        size: Bytes of the pool.
        device: Where it is, for instance ``torch.device("cpu")``.

    Raises:
        ValueError: this process has a pool already, or the size is not above 0.
        ImportError: nixl is not installed in this process's environment.
    """
    _transport().register_pool(size, device)


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
        ImportError: nixl is not installed in this process's environment.
    """
    _transport().set_cuda_stream(stream)
