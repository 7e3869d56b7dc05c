"""Write and register a user transport.

It moves tensors through files in shared memory. It is one-sided: only the consumer acts in a
transfer.

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
    """Writes each object to a file, from which consumers read it."""

    def tensor_transport_backend(self) -> str:
        """Return the name under which the transport is registered."""
        return "files"

    @staticmethod
    def is_one_sided() -> bool:
        """Return True: the producer takes no part in a transfer."""
        return True

    def extract_tensor_transport_metadata(
        self, obj_id: str, rdt_object: list[Any]
    ) -> TensorTransportMetadata:
        """Write the tensors. Runs on: producer, when the object is created."""
        torch.save(rdt_object, f"{FOLDER}/{obj_id}")
        return TensorTransportMetadata([(each.shape, each.dtype) for each in rdt_object], "cpu")

    def recv_multiple_tensors(
        self,
        obj_id: str,
        tensor_transport_metadata: TensorTransportMetadata,
        communicator_metadata: CommunicatorMetadata,
        target_buffers: list[Any] | None = None,
    ) -> list[Any]:
        """Read the tensors. Runs on: consumer."""
        received: list[Any] = torch.load(f"{FOLDER}/{obj_id}")
        return received

    def garbage_collect(
        self, obj_id: str, tensor_transport_meta: TensorTransportMetadata, tensors: list[Any]
    ) -> None:
        """Delete the file. Runs on: producer, when the last reference is gone."""
        os.unlink(f"{FOLDER}/{obj_id}")


register_tensor_transport("files", ["cpu"], Files, torch.Tensor)


@ray.remote
class Sender:
    """Produces tensors."""

    @ray.method(tensor_transport="files")
    def ones(self, size: int) -> torch.Tensor:
        """Return a tensor that is moved through a file."""
        return torch.ones(size)


@ray.remote
class Receiver:
    """Uses tensors. A consumer needs no transport option."""

    def total(self, values: torch.Tensor) -> float:
        """Return the sum."""
        return values.sum().item()


def main() -> None:
    """Pass one object to an actor and to the driver."""
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
