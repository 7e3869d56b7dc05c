"""One option turns a method's tensors into RDT objects: tensor_transport="gloo".

The tensor stays in the memory of the actor that made it. No group has to be made first:
a pair of processes connects by itself when a tensor first goes between them.

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
        """Returns a picture that stays here until somebody needs it."""
        self.last = torch.full((512, 512), brightness)
        return self.last


@ray.remote
class Meter:
    """Measures pictures; a consumer needs no option at all."""

    def mean(self, picture: torch.Tensor) -> float:
        """Returns the mean brightness."""
        return picture.mean().item()


def main() -> None:
    """Makes an RDT object and hands it over, with no group."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        camera, meter = Camera.remote(), Meter.remote()

        ref = camera.frame.remote(0.25)
        print(f"an ordinary ObjectRef: {type(ref).__name__}, transport {ref.tensor_transport()}")
        assert str(ref.tensor_transport()).lower() == "gloo"

        mean = ray.get(meter.mean.remote(ref))
        print(f"the meter read {mean}, straight from the camera's memory")
        assert mean == 0.25


if __name__ == "__main__":
    main()
