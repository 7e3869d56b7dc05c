"""A transport of one's own: a class with a few methods, registered under a name.

This one moves tensors through files in shared memory, and is read by the consumer alone.

Run: python examples/own_transport.py
"""

import os
from typing import Any

import torch

import ray
from ray.experimental import (
    CommunicatorMetadata,
    TensorTransportManager,
    TensorTransportMetadata,
    register_tensor_transport,
)

FOLDER = "/dev/shm"


class Files(TensorTransportManager):
    """Writes an object when it is made; each consumer reads it."""

    def tensor_transport_backend(self) -> str:
        """Returns the name that it is registered under."""
        return "files"

    @staticmethod
    def is_one_sided() -> bool:
        """The producer does nothing when a consumer reads."""
        return True

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[Any]
    ) -> TensorTransportMetadata:
        """Runs at the producer, when the object is made."""
        torch.save(rdt_object, f"{FOLDER}/{obj_id}")
        return TensorTransportMetadata([(each.shape, each.dtype) for each in rdt_object], "cpu")

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        """Runs at each consumer."""
        received: list[Any] = torch.load(f"{FOLDER}/{obj_id}")
        return received

    def garbage_collect(
        self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[Any]
    ) -> None:
        """Runs at the producer, when the last reference is gone."""
        os.unlink(f"{FOLDER}/{obj_id}")


register_tensor_transport("files", ["cpu"], Files, torch.Tensor)


@ray.remote
class Sender:
    """Makes tensors."""

    @ray.method(tensor_transport="files")
    def ones(self, size: int) -> torch.Tensor:
        """Returns a tensor that goes through a file."""
        return torch.ones(size)


@ray.remote
class Receiver:
    """Knows nothing about transports."""

    def total(self, values: torch.Tensor) -> float:
        """Returns the sum."""
        return values.sum().item()


def main() -> None:
    """Hands one object to an actor and to the driver."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        sender, receiver = Sender.remote(), Receiver.remote()
        ref = sender.ones.remote(1000)
        total = ray.get(receiver.total.remote(ref))
        print(f"an actor, through a file: {total}")
        assert total == 1000.0
        assert torch.equal(ray.get(ref), torch.ones(1000))
        print(ray.experimental.rdt.explain((ref, receiver)))


if __name__ == "__main__":
    main()
