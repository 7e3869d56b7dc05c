"""Pass a GPU tensor between two processes on one GPU with CUDA IPC.

Run: python examples/cuda_ipc_pass.py      (needs an NVIDIA GPU; skips without one)
"""

import torch

import ray


@ray.remote(num_gpus=0.5)
class Worker:
    """Produces matrices on the GPU and uses those of other workers."""

    @ray.method(tensor_transport="cuda_ipc")
    def identity(self, size: int) -> torch.Tensor:
        """Return an identity matrix that stays on the GPU."""
        return torch.eye(size, device="cuda")

    def trace(self, matrix: torch.Tensor) -> tuple[str, float]:
        """Return the device type of the matrix and the sum of its diagonal."""
        return matrix.device.type, matrix.trace().item()


def main() -> None:
    """Pass one matrix from one process to the other."""
    if not torch.cuda.is_available():
        print("skipped: CUDA IPC needs an NVIDIA GPU, and torch sees none here")
        return
    with ray.init(address="local", include_dashboard=False, log_to_driver=False):
        sender, receiver = Worker.remote(), Worker.remote()
        device, trace = ray.get(receiver.trace.remote(sender.identity.remote(1000)))
        print(f"4 MB over CUDA IPC: trace {trace} on {device}")
        assert (device, trace) == ("cuda", 1000.0)


if __name__ == "__main__":
    main()
