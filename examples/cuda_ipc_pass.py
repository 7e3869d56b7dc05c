"""A hand-over between two processes that share one GPU, without leaving the GPU.

Run: python examples/cuda_ipc_pass.py      (needs an NVIDIA GPU; says so and stops otherwise)
"""

import torch

import ray


@ray.remote(num_gpus=0.5)
class Worker:
    """Makes matrices on the GPU and looks at those of others."""

    @ray.method(tensor_transport="cuda_ipc")
    def identity(self, size: int) -> torch.Tensor:
        """Returns an identity matrix that stays on the GPU."""
        return torch.eye(size, device="cuda")

    def trace(self, matrix: torch.Tensor) -> tuple[str, float]:
        """Returns where the matrix is and the sum of its diagonal."""
        return matrix.device.type, matrix.trace().item()


def main() -> None:
    """Sends one matrix from process to process."""
    if not torch.cuda.is_available():
        print("skipped: CUDA IPC shows one process's GPU memory to another; torch sees no GPU here")
        return
    with ray.init(address="local", include_dashboard=False, log_to_driver=False):
        sender, receiver = Worker.remote(), Worker.remote()
        device, trace = ray.get(receiver.trace.remote(sender.identity.remote(1000)))
        print(f"4 MB over CUDA IPC: trace {trace} on {device}")
        assert (device, trace) == ("cuda", 1000.0)


if __name__ == "__main__":
    main()
