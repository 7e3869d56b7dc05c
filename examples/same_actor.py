"""Back to the actor that made it: the very same tensor, mutable, with no copy.

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
        """Returns the tensor itself: Ray keeps a reference, not a copy."""
        return self.counts

    def is_mine(self, counts: torch.Tensor) -> bool:
        """Says whether the argument is the kept tensor's memory."""
        return counts.data_ptr() == self.counts.data_ptr()

    def add_one(self, counts: torch.Tensor) -> None:
        """Changes its argument in place."""
        counts += 1

    def total(self, counts: torch.Tensor) -> float:
        """Returns the sum."""
        return counts.sum().item()


def main() -> None:
    """Shows that the maker gets its own tensor, and everybody sees its changes."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        maker, other = Counter.remote(), Counter.remote()
        create_collective_group([maker, other], backend="gloo")
        ref = maker.share.remote()

        mine = ray.get(maker.is_mine.remote(ref))
        print(f"the maker got the very tensor: {mine}")
        assert mine

        ray.get(maker.add_one.remote(ref))
        total = ray.get(maker.total.remote(ref))
        print(f"it changed it in place; through the same ref the sum is now {total}")
        assert total == 100_000.0

        elsewhere = ray.get(other.total.remote(ref))
        print(f"another actor that takes the ref now reads {elsewhere}")
        assert elsewhere == 100_000.0


if __name__ == "__main__":
    main()
