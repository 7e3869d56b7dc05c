"""Return an RDT object from a method with tensor_transport="gloo".

The tensor stays in the memory of its producer. No group is required: a pair of processes connects
at its first transfer.

Run: python examples/gloo_method.py
"""

import torch

import ray


@ray.remote
class Camera:
    """Produces one frame at a time and remembers the last."""

    def __init__(self) -> None:
        self.last = torch.empty(0)

    @ray.method(tensor_transport="gloo")
    def frame(self, brightness: float) -> torch.Tensor:
        """Return a picture that stays in this process until a consumer needs it."""
        self.last = torch.full((512, 512), brightness)
        return self.last


@ray.remote
class Meter:
    """Measures pictures. A consumer needs no transport option."""

    def mean(self, picture: torch.Tensor) -> float:
        """Return the mean brightness."""
        return picture.mean().item()


def main() -> None:
    """Create an RDT object and pass it to another actor without a group."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        camera, meter = Camera.remote(), Meter.remote()

        ref = camera.frame.remote(0.25)
        print(f"an ordinary ObjectRef: {type(ref).__name__}, transport {ref.tensor_transport()}")
        assert str(ref.tensor_transport()).lower() == "gloo"

        mean = ray.get(meter.mean.remote(ref))
        print(f"the meter read {mean} from the camera's memory")
        assert mean == 0.25


if __name__ == "__main__":
    main()
