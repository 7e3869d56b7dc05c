"""Use ray.get in the driver and ray.put with a transport.

Run: python examples/driver_get.py
"""

import torch

import ray


@ray.remote
class Model:
    """Holds a weight matrix."""

    def __init__(self) -> None:
        self.weight = torch.arange(250_000, dtype=torch.float32).view(500, 500)

    @ray.method(tensor_transport="gloo")
    def row_sums(self) -> dict[str, torch.Tensor]:
        """Return a tensor and its sums over rows."""
        return {"weight": self.weight, "sums": self.weight.sum(dim=1)}

    def top_left(self, weight: torch.Tensor) -> float:
        """Return the first element."""
        return weight[0, 0].item()


def main() -> None:
    """Get an RDT object from an actor and pass another one to it."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        model = Model.remote()
        expected = torch.arange(250_000, dtype=torch.float32).view(500, 500)
        ref = model.row_sums.remote()

        got = ray.get(ref)
        print(f"ray.get over the transport: {sorted(got)}")
        assert torch.equal(got["weight"], expected)
        assert torch.equal(got["sums"], expected.sum(dim=1))

        stored = ray.get(ref, _use_object_store=True)
        print("ray.get with _use_object_store=True gives the same values; the option has no effect")
        assert torch.equal(stored["weight"], expected)

        mine = ray.put(expected + 7, _tensor_transport="gloo")
        first = ray.get(model.top_left.remote(mine))
        print(f"ray.put with a transport: the actor read {first} from the driver's memory")
        assert first == 7.0


if __name__ == "__main__":
    main()
