"""Interface of user-defined transports.

Required methods are ``tensor_transport_backend``, ``is_one_sided``,
``extract_tensor_transport_metadata`` and ``recv_multiple_tensors``. A two-sided transport also
needs ``send_multiple_tensors``. Names and arguments are those of Ray's alpha, so that code written
for it runs unchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.util.annotations import PublicAPI

if TYPE_CHECKING:
    import torch

    import ray


@PublicAPI(stability="alpha")
@dataclass
class CommunicatorMetadata:
    """Data that connects the two sides of a transfer. It is pickled. Subclass it to add fields."""


@PublicAPI(stability="alpha")
@dataclass
class TensorTransportMetadata:
    """Description of an object's tensors for consumers. It is pickled. Subclass it to add fields.

    Attributes:
        tensor_meta: The shape and dtype of each tensor.
        tensor_device: The device type of the tensors.
    """

    tensor_meta: list[tuple[Any, Any]]
    tensor_device: str | None = None


@PublicAPI(stability="alpha")
@dataclass
class FetchRequest:
    """An in-flight fetch. A transport that works in the background may subclass it.

    Attributes:
        obj_id: The object's id in hex.
        tensors: The received tensors.
    """

    obj_id: str
    tensors: list[Any]


@PublicAPI(stability="alpha")
class TensorTransportManager(ABC):
    """Base class for transports that move an object's tensors from a producer to a consumer."""

    @abstractmethod
    def tensor_transport_backend(self) -> str:
        """Return the name to use as ``tensor_transport``. Case does not matter."""

    @staticmethod
    @abstractmethod
    def is_one_sided() -> bool:
        """Return True if only the consumer acts, False if the producer sends for each transfer."""

    @staticmethod
    def can_abort_transport() -> bool:
        """Return whether ``abort_transport`` ends a transfer that hangs."""
        return False

    def actor_has_tensor_transport(self, actor: ray.actor.ActorHandle) -> bool:
        """Return whether an actor can use this transport."""
        return True

    @abstractmethod
    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[Any]
    ) -> TensorTransportMetadata:
        """Describe new tensors for their consumers.

        Runs on: producer, the thread of the task that created the tensors.

        Args:
            obj_id: The object's id in hex.
            rdt_object: The tensors of the object.
        """

    def get_communicator_metadata(
        self,
        src_actor: ray.actor.ActorHandle,
        dst_actor: ray.actor.ActorHandle,
        backend: str | None = None,
    ) -> CommunicatorMetadata:
        """Return the data that both sides need for one transfer, such as ranks in a group."""
        return CommunicatorMetadata()

    @abstractmethod
    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        """Receive an object's tensors. Runs on: consumer. May block.

        Args:
            obj_id: The object's id in hex.
            tensor_transport_metadata: The result of ``extract_tensor_transport_metadata``.
            communicator_metadata: The result of ``get_communicator_metadata``.
            target_buffers: Tensors to receive into. None means new tensors.
        """

    def fetch_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> FetchRequest:
        """Start to receive. The default calls ``recv_multiple_tensors`` with the same arguments."""
        received = self.recv_multiple_tensors(
            obj_id, tensor_transport_metadata, communicator_metadata, target_buffers
        )
        return FetchRequest(obj_id, received)

    def wait_fetch_complete(self, fetch_request: FetchRequest, timeout: float = -1) -> list[Any]:
        """Wait for a fetch that ``fetch_multiple_tensors`` started.

        Args:
            fetch_request: The result of ``fetch_multiple_tensors``.
            timeout: Seconds to wait. -1 means no limit, 0 means no wait.

        Raises:
            TimeoutError: The tensors have not arrived.
        """
        return fetch_request.tensors

    def send_multiple_tensors(
        self,
        tensors: list[Any],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        """Send an object's tensors to one consumer. Two-sided only. Runs on: producer."""
        raise NotImplementedError(f"{type(self).__name__} is two-sided but does not send")

    def garbage_collect(
        self,
        obj_id: str,
        tensor_transport_meta: TensorTransportMetadata,
        tensors: list[Any],
    ) -> None:
        """Release the resources of ``extract_tensor_transport_metadata``. Runs on: producer."""

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """End a transfer that failed or hangs. Runs on: producer or consumer."""


def create_empty_tensors_from_metadata(
    tensor_transport_meta: TensorTransportMetadata, device: str | None = None
) -> list[torch.Tensor]:
    """Create uninitialized tensors to receive an object into.

    Args:
        tensor_transport_meta: The description of the object.
        device: The device of the new tensors. None means the device type of the object.
    """
    import torch

    place = tensor_transport_meta.tensor_device if device is None else device
    return [
        torch.empty(shape, dtype=dtype, device=place)
        for shape, dtype in tensor_transport_meta.tensor_meta
    ]
