"""Pass a GPU tensor between two GPUs with NCCL.

Run: python examples/nccl_pass.py      (needs two NVIDIA GPUs; skips without them)
"""

import torch

import ray
from ray.experimental.collective import create_collective_group


@ray.remote(num_gpus=1, enable_tensor_transport=True)
class Worker:
    """Produces matrices on its own GPU and uses those of other workers."""

    @ray.method(tensor_transport="nccl")
    def identity(self, size: int) -> torch.Tensor:
        """Return an identity matrix that stays on this GPU."""
        return torch.eye(size, device="cuda")

    def trace(self, matrix: torch.Tensor) -> tuple[str, float]:
        """Return the device type of the matrix and the sum of its diagonal."""
        return matrix.device.type, matrix.trace().item()


def main() -> None:
    """Pass one matrix from GPU to GPU."""
    gpus = torch.cuda.device_count()
    if gpus < 2:
        print(f"skipped: NCCL needs two NVIDIA GPUs, and torch sees {gpus} here")
        return
    with ray.init(address="local", include_dashboard=False, log_to_driver=False):
        sender, receiver = Worker.remote(), Worker.remote()
        create_collective_group([sender, receiver], backend="nccl")

        device, trace = ray.get(receiver.trace.remote(sender.identity.remote(1000)))
        print(f"4 MB over NCCL: trace {trace} on {device}")
        assert (device, trace) == ("cuda", 1000.0)


if __name__ == "__main__":
    main()
