"""This process's nixl, for programs that reach for it by the names of Ray's alpha."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ray.util.annotations import PublicAPI

from ray.experimental.rdt import nixl_api
from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.accelerators import writers
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
)
from ray.experimental.rdt.transports.base import Peer
from ray.experimental.rdt.util import create_empty_tensors_from_metadata

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.manager import RDTManager
    from ray.experimental.rdt.transports.nixl.transport import NixlTransport


@PublicAPI(stability="alpha")
@dataclass
class NixlCommunicatorMetadata(CommunicatorMetadata):
    """nixl's agents find each other by what describes the object."""


@PublicAPI(stability="alpha")
@dataclass
class NixlTransportMetadata(TensorTransportMetadata):
    """Where an object's tensors are.

    Attributes:
        exposed: What the producer's agent says of their memory; empty without tensors.
    """

    exposed: dict[str, Any] = field(default_factory=dict)


@PublicAPI(stability="alpha")
class NixlTensorTransport(TensorTransportManager):
    """Acts on the agent that RDT uses in this process; RDT itself does not go through it.

    An object that a program describes here is sent from where it is, not from a memory pool. Its
    tensors have to be contiguous.
    """

    def __init__(self) -> None:
        self._live: dict[str, tuple[list[torch.Tensor], dict[str, Any]]] = {}

    def tensor_transport_backend(self) -> str:
        """See ``TensorTransportManager``."""
        return "NIXL"

    @staticmethod
    def is_one_sided() -> bool:
        """See ``TensorTransportManager``."""
        return True

    def get_nixl_agent(self) -> Any:
        """Nixl's own ``nixl_agent``; started if it is not.

        Raises:
            TransportUnavailable: nixl cannot be started; an ImportError if it is not installed.
        """
        return _transport().engine.agent

    def select_backend(self) -> str:
        """The nixl backend that the agent uses: "UCX" or "LIBFABRIC"."""
        return _transport().engine.backend

    # Ray's benchmark of weight transfer and its tests look at these parts of Ray's class.

    _backend = property(select_backend)
    _memory_pool = None

    def _get_meta(self, object_id: str) -> None:
        """RDT describes objects to their consumers when they ask, and not before."""

    def _get_num_managed_meta_nixl(self) -> int:
        """How many objects of this process are described to consumers."""
        return _manager().stats()["exposed"]

    def register_nixl_memory(self, tensor: torch.Tensor) -> None:
        """See ``ray.experimental.register_nixl_memory``."""
        nixl_api.register_nixl_memory(tensor)

    def deregister_nixl_memory(self, tensor: torch.Tensor) -> None:
        """See ``ray.experimental.deregister_nixl_memory``."""
        nixl_api.deregister_nixl_memory(tensor)

    def register_nixl_memory_pool(self, size: int, device: torch.device) -> None:
        """See ``ray.experimental.register_nixl_memory_pool``."""
        nixl_api.register_nixl_memory_pool(size, device)

    def set_cuda_stream(self, stream: torch.cuda.Stream | None) -> None:
        """See ``ray.experimental.set_nixl_cuda_stream``."""
        nixl_api.set_nixl_cuda_stream(stream)

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[torch.Tensor]
    ) -> NixlTransportMetadata:
        """Describes tensors for another process's ``recv_multiple_tensors``.

        They are kept, and may be read, until ``garbage_collect``. Waits for what writes them.

        Raises:
            ValueError: one is not contiguous.
            TransportUnavailable: nixl cannot send them.
            TimeoutError: a device does not finish them in the time of a fetch.
        """
        deadline = time.monotonic() + settings().fetch_timeout_s
        for event in writers.record(rdt_object):
            event.wait(max(0.0, deadline - time.monotonic()))
        exposed = _transport().expose([_flat(tensor) for tensor in rdt_object])
        self._live[obj_id] = rdt_object, exposed
        device = rdt_object[0].device.type if rdt_object else None
        return NixlTransportMetadata(
            [(tensor.shape, tensor.dtype) for tensor in rdt_object], device, exposed
        )

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        """See ``TensorTransportManager``. Waits for no longer than a fetch may take.

        Raises:
            ValueError: a target is not contiguous, or of another size.
            NixlError, TimeoutError: the transfer failed.
        """
        exposed = cast(NixlTransportMetadata, tensor_transport_metadata).exposed
        tensors = target_buffers or create_empty_tensors_from_metadata(tensor_transport_metadata)
        buffers = [_flat(tensor) for tensor in tensors]
        deadline = time.monotonic() + settings().fetch_timeout_s
        after = accelerators.record(tensors)
        _transport().read(Peer(b"", b""), exposed, buffers, deadline, after)
        return tensors

    def garbage_collect(
        self,
        obj_id: str,
        tensor_transport_meta: TensorTransportMetadata,
        tensors: list[torch.Tensor],
    ) -> None:
        """See ``TensorTransportManager``."""
        _, exposed = self._live.pop(obj_id, ([], {}))
        if exposed:
            _transport().withdraw(exposed)


def _manager() -> RDTManager:
    import ray

    manager: RDTManager = ray._private.worker.global_worker.rdt_manager
    return manager


def _transport() -> NixlTransport:
    return cast("NixlTransport", _manager().transport("nixl"))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, as bytes."""
    import torch

    if not tensor.is_contiguous():
        raise ValueError("nixl takes contiguous tensors only")
    return tensor.detach().view(-1).view(torch.uint8)
