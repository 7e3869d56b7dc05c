"""Base class for transports over collective groups, with the names of Ray's alpha.

The built-in gloo and nccl transports are other classes. These classes move tensors with
``ray.util.collective`` over a group that ``create_collective_group`` created. The backend of the
group is gloo, nccl, or a backend that the user registered with Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ray.util.annotations import PublicAPI

from ray.experimental.rdt.tensor_transport_manager import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
    create_empty_tensors_from_metadata,
)
from ray.experimental.rdt.transports.base import TransportUnavailable

if TYPE_CHECKING:
    import torch

    import ray


@PublicAPI(stability="alpha")
@dataclass
class CollectiveTransportMetadata(TensorTransportMetadata):
    """Description of an object's tensors, without additional fields."""


@PublicAPI(stability="alpha")
@dataclass
class CollectiveCommunicatorMetadata(CommunicatorMetadata):
    """The two members of a group that take part in a transfer.

    Attributes:
        communicator_name: The group's name.
        src_rank: The producer's rank.
        dst_rank: The consumer's rank.
    """

    communicator_name: str = ""
    src_rank: int | None = None
    dst_rank: int | None = None


@PublicAPI(stability="alpha")
class CollectiveTensorTransport(TensorTransportManager):
    """Transport between two members of a group. Subclasses name the backend of the group."""

    def tensor_transport_backend(self) -> str:
        """Return the backend of the groups, which is also the name of the transport."""
        raise NotImplementedError(
            f"{type(self).__name__}.tensor_transport_backend has to name a collective backend"
        )

    @staticmethod
    def is_one_sided() -> bool:
        return False

    def actor_has_tensor_transport(self, actor: ray.actor.ActorHandle) -> bool:
        """Return whether the actor is in a group of this backend."""
        return bool(_groups([actor], self.tensor_transport_backend()))

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[torch.Tensor]
    ) -> CollectiveTransportMetadata:
        """See ``TensorTransportManager``. Raises ValueError for more than one device type."""
        types = {tensor.device.type for tensor in rdt_object}
        if len(types) > 1:
            raise ValueError(f"the tensors of one object are on several devices: {sorted(types)}")
        return CollectiveTransportMetadata(
            tensor_meta=[(tensor.shape, tensor.dtype) for tensor in rdt_object],
            tensor_device=next(iter(types), None),
        )

    def get_communicator_metadata(
        self,
        src_actor: ray.actor.ActorHandle,
        dst_actor: ray.actor.ActorHandle,
        backend: str | None = None,
    ) -> CollectiveCommunicatorMetadata:
        """Return the ranks of both actors in the oldest group that they share.

        Raises:
            TransportUnavailable: They share no group. RDT then uses a fallback lane.
        """
        actors = [actor for actor in (src_actor, dst_actor) if actor is not None]
        shared = _groups(actors, backend or self.tensor_transport_backend())
        if len(actors) < 2 or not shared:
            raise TransportUnavailable(
                f"no collective group of {backend or self.tensor_transport_backend()} has both "
                "actors as members; create one with "
                "ray.experimental.collective.create_collective_group"
            )
        group = shared[0]
        ranks = [group.get_rank(actor) for actor in actors]
        return CollectiveCommunicatorMetadata(group.name, *ranks)

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[torch.Tensor] | None = None,
    ) -> list[torch.Tensor]:
        from ray.util import collective

        pair = cast(CollectiveCommunicatorMetadata, communicator_metadata)
        tensors = target_buffers or create_empty_tensors_from_metadata(tensor_transport_metadata)
        for tensor in tensors:
            collective.recv(tensor, pair.src_rank, pair.communicator_name)
        return tensors

    def send_multiple_tensors(
        self,
        tensors: list[torch.Tensor],
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
    ) -> None:
        from ray.util import collective

        pair = cast(CollectiveCommunicatorMetadata, communicator_metadata)
        for tensor in tensors:
            collective.send(tensor, pair.dst_rank, pair.communicator_name)


@PublicAPI(stability="alpha")
class NCCLTensorTransport(CollectiveTensorTransport):
    """Transport over nccl groups."""

    def tensor_transport_backend(self) -> str:
        """See ``CollectiveTensorTransport``."""
        return "NCCL"


@PublicAPI(stability="alpha")
class GLOOTensorTransport(CollectiveTensorTransport):
    """Transport over gloo groups."""

    def tensor_transport_backend(self) -> str:
        """See ``CollectiveTensorTransport``."""
        return "GLOO"


def _groups(actors: list[ray.actor.ActorHandle], backend: str) -> list[Any]:
    from ray.experimental.collective import get_collective_groups

    return list(get_collective_groups(actors, backend))
