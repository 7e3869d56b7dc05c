"""Pass an RDT object back to its producer, which gets the same tensor without a copy.

Run: python examples/same_actor.py
"""

import torch

import ray
from ray.experimental.collective import create_collective_group


@ray.remote(enable_tensor_transport=True)
class Counter:
    """Keeps one tensor and hands out references to it."""

    def __init__(self) -> None:
        self.counts = torch.zeros(100_000)

    @ray.method(tensor_transport="gloo")
    def share(self) -> torch.Tensor:
        """Return the tensor itself. RDT keeps a reference and no copy."""
        return self.counts

    def is_mine(self, counts: torch.Tensor) -> bool:
        """Return whether the argument is the memory of the kept tensor."""
        return counts.data_ptr() == self.counts.data_ptr()

    def add_one(self, counts: torch.Tensor) -> None:
        """Change the argument in place."""
        counts += 1

    def total(self, counts: torch.Tensor) -> float:
        """Return the sum."""
        return counts.sum().item()


def main() -> None:
    """Show that the producer gets its own tensor and that consumers receive its changes."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        producer, other = Counter.remote(), Counter.remote()
        create_collective_group([producer, other], backend="gloo")
        ref = producer.share.remote()

        mine = ray.get(producer.is_mine.remote(ref))
        print(f"the producer got the same tensor: {mine}")
        assert mine

        ray.get(producer.add_one.remote(ref))
        total = ray.get(producer.total.remote(ref))
        print(f"the producer changed it in place; through the same ref its sum is now {total}")
        assert total == 100_000.0

        elsewhere = ray.get(other.total.remote(ref))
        print(f"another actor that gets the ref now reads {elsewhere}")
        assert elsewhere == 100_000.0


if __name__ == "__main__":
    main()
