"""Return a tensor without RDT, through Ray's object store.

Run: python examples/plain_return.py
"""

import torch

import ray


@ray.remote
class Camera:
    """Produces one frame at a time."""

    def frame(self, brightness: float) -> torch.Tensor:
        """Return a small gray picture."""
        return torch.full((4, 4), brightness)


@ray.remote
class Meter:
    """Measures pictures."""

    def mean(self, picture: torch.Tensor) -> float:
        """Return the mean brightness."""
        return picture.mean().item()


def main() -> None:
    """Pass a plain Ray object from one actor to another and to the driver."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        camera, meter = Camera.remote(), Meter.remote()

        ref = camera.frame.remote(0.5)  # copied into the object store
        mean = ray.get(meter.mean.remote(ref))  # and out of it
        print(f"the meter read {mean} from a copy in the object store")
        assert mean == 0.5

        picture = ray.get(ref)
        print(f"the driver got its own copy, shape {tuple(picture.shape)}")
        assert torch.equal(picture, torch.full((4, 4), 0.5))


if __name__ == "__main__":
    main()
