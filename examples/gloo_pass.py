"""Pass an RDT object to another actor through a gloo group of two.

Run: python examples/gloo_pass.py
"""

import torch

import ray
from ray.experimental.collective import create_collective_group


@ray.remote(enable_tensor_transport=True)
class Worker:
    """Produces matrices and uses those of other workers."""

    @ray.method(tensor_transport="gloo")
    def identity(self, size: int) -> torch.Tensor:
        """Return an identity matrix that stays in this process."""
        return torch.eye(size)

    def trace(self, matrix: torch.Tensor) -> float:
        """Return the sum of the diagonal."""
        return matrix.trace().item()


def main() -> None:
    """Pass one matrix twice, and another one in the opposite direction."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        sender, receiver = Worker.remote(), Worker.remote()
        create_collective_group([sender, receiver], backend="gloo")

        ref = sender.identity.remote(1000)
        first = ray.get(receiver.trace.remote(ref))
        second = ray.get(receiver.trace.remote(ref))
        print(f"4 MB over gloo, twice from one ref: trace {first}, then {second}")
        assert first == second == 1000.0

        back = ray.get(sender.trace.remote(receiver.identity.remote(10)))
        print(f"and in the opposite direction: trace {back}")
        assert back == 10.0


if __name__ == "__main__":
    main()
