"""Pass one RDT object to an actor, a task and the driver with tensor_transport="auto".

Run: python examples/auto_pass.py
"""

import torch

import ray


@ray.remote
class Sender:
    """Produces tensors."""

    @ray.method(tensor_transport="auto")
    def ones(self, size: int) -> torch.Tensor:
        """Return a tensor that stays in this process."""
        return torch.ones(size)


@ray.remote
class Receiver:
    """Uses tensors. A consumer needs no transport option."""

    def total(self, *, values: torch.Tensor) -> float:
        """Return the sum."""
        return values.sum().item()


@ray.remote
def mean(values: torch.Tensor) -> float:
    """Return the mean. Tasks accept RDT objects as well."""
    return values.mean().item()


def main() -> None:
    """Pass one object to an actor, a task and the driver."""
    with ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False):
        sender, receiver = Sender.remote(), Receiver.remote()
        ref = sender.ones.remote(1 << 20)

        total = ray.get(receiver.total.remote(values=ref))
        print(f"an actor, by keyword: {total}")
        assert total == float(1 << 20)

        average = ray.get(mean.remote(ref))
        print(f"a task: {average}")
        assert average == 1.0

        values = ray.get(ref)
        print(f"the driver: {values.numel()} elements")
        assert torch.equal(values, torch.ones(1 << 20))


if __name__ == "__main__":
    main()
