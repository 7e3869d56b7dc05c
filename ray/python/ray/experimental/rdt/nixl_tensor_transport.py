"""Access to the nixl agent of this process, with the names of Ray's alpha."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ray.util.annotations import PublicAPI

from ray.experimental.rdt import nixl_api
from ray.experimental.rdt.accelerators import registry as accelerators
from ray.experimental.rdt.api import current_manager
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
    create_empty_tensors_from_metadata,
)
from ray.experimental.rdt.transports.base import Peer

if TYPE_CHECKING:
    import torch


@PublicAPI(stability="alpha")
@dataclass
class NixlCommunicatorMetadata(CommunicatorMetadata):
    """Empty. The description of an object is enough for nixl agents to connect."""


@PublicAPI(stability="alpha")
@dataclass
class NixlTransportMetadata(TensorTransportMetadata):
    """Location of an object's tensors.

    Attributes:
        exposed: The producer's description of the memory. Empty if there are no tensors.
    """

    exposed: dict[str, Any] = field(default_factory=dict)


@PublicAPI(stability="alpha")
class NixlTensorTransport(TensorTransportManager):
    """Interface to the nixl agent of this process for programs. RDT itself does not use it.

    Objects described here are sent from their own memory and not from a memory pool. Their tensors
    must be contiguous.
    """

    def __init__(self) -> None:
        self._live: dict[str, tuple[list[torch.Tensor], dict[str, Any]]] = {}

    def tensor_transport_backend(self) -> str:
        return "NIXL"

    @staticmethod
    def is_one_sided() -> bool:
        return True

    def get_nixl_agent(self) -> Any:
        """Return the ``nixl_agent`` of this process; start it on the first call.

        Raises:
            TransportUnavailable: nixl cannot be started. If it is not installed, the error is also
                an ImportError.
        """
        return nixl_api.nixl_transport().endpoint().engine.agent

    def select_backend(self) -> str:
        """Return the nixl backend of the agent: "UCX" or "LIBFABRIC"."""
        return nixl_api.nixl_transport().endpoint().engine.backend

    # Ray's weight transfer benchmark and its tests read these attributes of Ray's class.

    _backend = property(select_backend)
    _memory_pool = None

    def _get_meta(self, object_id: str) -> None:
        """Return None: RDT describes an object only when a consumer asks for it."""

    def _get_num_managed_meta_nixl(self) -> int:
        """Return the number of objects of this process that are described to consumers."""
        return current_manager().stats()["exposed"]

    register_nixl_memory = staticmethod(nixl_api.register_nixl_memory)
    deregister_nixl_memory = staticmethod(nixl_api.deregister_nixl_memory)
    register_nixl_memory_pool = staticmethod(nixl_api.register_nixl_memory_pool)
    set_cuda_stream = staticmethod(nixl_api.set_nixl_cuda_stream)

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[torch.Tensor]
    ) -> NixlTransportMetadata:
        """Describe tensors for ``recv_multiple_tensors`` in another process.

        The tensors are kept and stay readable until ``garbage_collect``. Waits for pending writes
        to them.

        Raises:
            ValueError: A tensor is not contiguous.
            TransportUnavailable: nixl cannot send the tensors.
            TimeoutError: A device does not finish the writes within the fetch timeout.
        """
        deadline = Deadline.after(settings().fetch_timeout_s)
        for event in accelerators.record_writers(rdt_object):
            event.wait(deadline.left_s())
        exposed = nixl_api.nixl_transport().expose([_flat(tensor) for tensor in rdt_object])
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
        """See ``TensorTransportManager``. Waits at most for the fetch timeout.

        Raises:
            ValueError: A target is not contiguous or has another size.
            NixlError, TimeoutError: The transfer failed.
        """
        exposed = cast(NixlTransportMetadata, tensor_transport_metadata).exposed
        tensors = target_buffers or create_empty_tensors_from_metadata(tensor_transport_metadata)
        buffers = [_flat(tensor) for tensor in tensors]
        deadline = Deadline.after(settings().fetch_timeout_s)
        after = accelerators.record(tensors)
        nixl_api.nixl_transport().read(Peer(b"", b""), exposed, buffers, deadline, after)
        return tensors

    def garbage_collect(
        self,
        obj_id: str,
        tensor_transport_meta: TensorTransportMetadata,
        tensors: list[torch.Tensor],
    ) -> None:
        _, exposed = self._live.pop(obj_id, ([], {}))
        if exposed:
            nixl_api.nixl_transport().withdraw(exposed)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a contiguous tensor as bytes."""
    import torch

    if not tensor.is_contiguous():
        raise ValueError("nixl takes contiguous tensors only")
    return tensor.detach().view(-1).view(torch.uint8)
