"""Pass tensors inside Python data, next to values that are not tensors.

Run: python examples/gloo_nested.py
"""

from dataclasses import dataclass, field

import torch

import ray
from ray.experimental.collective import create_collective_group


@dataclass
class Batch:
    """A training batch: tensors and notes in one object."""

    name: str
    inputs: torch.Tensor
    labels: list[torch.Tensor]
    notes: dict[str, int] = field(default_factory=dict)


@ray.remote(enable_tensor_transport=True)
class Loader:
    """Produces batches."""

    @ray.method(tensor_transport="gloo")
    def batch(self, rows: int) -> Batch:
        """Return three tensors, a name and a dict in one object."""
        labels = [torch.arange(rows), torch.ones(rows, dtype=torch.bool)]
        return Batch("train", torch.rand(rows, 8), labels, {"rows": rows})

    @ray.method(tensor_transport="gloo")
    def pair(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return several tensors of different types."""
        return torch.zeros(3), {"half": torch.ones(2, dtype=torch.bfloat16)}


@ray.remote(enable_tensor_transport=True)
class Learner:
    """Uses batches."""

    def describe(self, batch: Batch) -> str:
        """Return a description of the batch."""
        sizes = [tuple(tensor.shape) for tensor in (batch.inputs, *batch.labels)]
        return f"{batch.name}: {sizes}, {batch.notes}, label sum {batch.labels[0].sum().item()}"

    def types(self, pair: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> list[str]:
        """Return the element types of the two tensors."""
        return [str(pair[0].dtype), str(pair[1]["half"].dtype)]


def main() -> None:
    """Pass a dataclass and a tuple, both with tensors inside."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False):
        loader, learner = Loader.remote(), Learner.remote()
        create_collective_group([loader, learner], backend="gloo")

        said = ray.get(learner.describe.remote(loader.batch.remote(4)))
        print(f"the learner got {said}")
        assert said == "train: [(4, 8), (4,), (4,)], {'rows': 4}, label sum 6"

        types = ray.get(learner.types.remote(loader.pair.remote()))
        print(f"and a tuple with a dict inside: {types}")
        assert types == ["torch.float32", "torch.bfloat16"]


if __name__ == "__main__":
    main()
