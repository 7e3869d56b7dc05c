"""Pass a tensor with NIXL, to another actor and to the driver.

Run: python examples/nixl_pass.py      (needs: pip install nixl; works on the CPU)
"""

import importlib

import torch

import ray


@ray.remote(enable_tensor_transport=True)
class Worker:
    """Produces tensors and adds up those of other workers."""

    @ray.method(tensor_transport="nixl")
    def ramp(self, size: int) -> torch.Tensor:
        """Return 0, 1, 2, ... on the GPU if there is one."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.arange(size, dtype=torch.float64, device=device)

    def total(self, ramp: torch.Tensor) -> float:
        """Return the sum."""
        return ramp.sum().item()


def main() -> None:
    """Pass one tensor from one actor to the other and to the driver."""
    try:
        importlib.import_module("nixl._api")
    except ImportError as error:
        print(f"skipped: nixl cannot be imported here: {error} (pip install nixl)")
        return
    gpus = 1 if torch.cuda.device_count() >= 2 else 0
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        sender, receiver = (Worker.options(num_gpus=gpus).remote() for _ in range(2))

        ref = sender.ramp.remote(1000)
        total = ray.get(receiver.total.remote(ref))
        print(f"the receiver added up {total} over NIXL, without a group")
        assert total == 499_500.0

        ramp = ray.get(ref)
        print(f"the driver got {ramp.numel()} elements on {ramp.device.type}")
        assert ramp.sum().item() == 499_500.0


if __name__ == "__main__":
    main()
