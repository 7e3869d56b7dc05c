"""The interface for a transport that a user writes.

Only ``tensor_transport_backend``, ``is_one_sided``, ``extract_tensor_transport_metadata`` and
``recv_multiple_tensors`` (and ``send_multiple_tensors`` where it is two-sided) have to be written.
The names and arguments are those of Ray's alpha, so that code written for it runs unchanged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.util.annotations import PublicAPI

if TYPE_CHECKING:
    import ray


@PublicAPI(stability="alpha")
@dataclass
class CommunicatorMetadata:
    """What both sides of a transfer need to find each other. Subclass it; it is pickled."""


@PublicAPI(stability="alpha")
@dataclass
class TensorTransportMetadata:
    """What a consumer needs to know to receive an object's tensors. Subclass it; it is pickled.

    Attributes:
        tensor_meta: For each tensor its shape and dtype.
        tensor_device: The type of the device that the tensors are on.
    """

    tensor_meta: list[tuple[Any, Any]]
    tensor_device: str | None = None


@PublicAPI(stability="alpha")
@dataclass
class FetchRequest:
    """A fetch under way. A transport that works in the background may subclass it.

    Attributes:
        obj_id: The object's id in hex.
        tensors: The tensors received.
    """

    obj_id: str
    tensors: list[Any]


@PublicAPI(stability="alpha")
class TensorTransportManager(ABC):
    """Moves the tensors of an object from the process that made them to one that uses them."""

    @abstractmethod
    def tensor_transport_backend(self) -> str:
        """The name that users write for ``tensor_transport``, in any case."""

    @staticmethod
    @abstractmethod
    def is_one_sided() -> bool:
        """True if the consumer alone acts; False if the producer has to send for each transfer."""

    @staticmethod
    def can_abort_transport() -> bool:
        """Whether ``abort_transport`` ends a transfer that does not come to its end."""
        return False

    def actor_has_tensor_transport(self, actor: ray.actor.ActorHandle) -> bool:
        """Whether an actor can use this transport."""
        return True

    @abstractmethod
    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[Any]
    ) -> TensorTransportMetadata:
        """Describes new tensors for their consumers.

        Runs on: producer, the thread of the task that made them.

        Args:
            obj_id: The object's id in hex.
            rdt_object: Its tensors.
        """

    def get_communicator_metadata(
        self,
        src_actor: ray.actor.ActorHandle,
        dst_actor: ray.actor.ActorHandle,
        backend: str | None = None,
    ) -> CommunicatorMetadata:
        """What both sides need for one transfer, ranks in a group for instance."""
        return CommunicatorMetadata()

    @abstractmethod
    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        """Receives an object's tensors. Runs on: consumer; may block.

        Args:
            obj_id: The object's id in hex.
            tensor_transport_metadata: What the producer extracted.
            communicator_metadata: What ``get_communicator_metadata`` gave.
            target_buffers: Tensors to receive into, None for new ones.
        """

    def fetch_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> FetchRequest:
        """Begins to receive; arguments as ``recv_multiple_tensors``, which it calls by default."""
        received = self.recv_multiple_tensors(
            obj_id, tensor_transport_metadata, communicator_metadata, target_buffers
        )
        return FetchRequest(obj_id, received)

    def wait_fetch_complete(self, fetch_request: FetchRequest, timeout: float = -1) -> list[Any]:
        """Waits for ``fetch_multiple_tensors``.

        Args:
            fetch_request: What it returned.
            timeout: Seconds; -1 waits for ever, 0 not at all.

        Raises:
            TimeoutError: the tensors are not here yet.
        """
        return fetch_request.tensors

    def send_multiple_tensors(
        self,
        tensors: list[Any],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        """Sends an object's tensors to one consumer. Two-sided only. Runs on: producer."""
        raise NotImplementedError(f"{type(self).__name__} is two-sided but does not send")

    def garbage_collect(
        self,
        obj_id: str,
        tensor_transport_meta: TensorTransportMetadata,
        tensors: list[Any],
    ) -> None:
        """Gives back what ``extract_tensor_transport_metadata`` took. Runs on: producer."""

    def abort_transport(self, obj_id: str, communicator_metadata: CommunicatorMetadata) -> None:
        """Ends a transfer that failed on the other side. Runs on: both."""
