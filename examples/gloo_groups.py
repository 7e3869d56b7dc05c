"""Create and destroy a collective group of actors, and create another one with the same actors.

Run: python examples/gloo_groups.py
"""

import torch

import ray
from ray.experimental.collective import (
    create_collective_group,
    destroy_collective_group,
    get_collective_groups,
)


@ray.remote(enable_tensor_transport=True)
class Node:
    """Produces vectors and adds up received ones."""

    @ray.method(tensor_transport="gloo")
    def vector(self, value: float) -> torch.Tensor:
        """Return a vector, sent over the gloo connections of the group."""
        return torch.full((1000,), value)

    def total(self, vector: torch.Tensor) -> float:
        """Return the sum of a vector."""
        return vector.sum().item()


def pass_around(nodes: list[ray.actor.ActorHandle]) -> list[float]:
    """Send one vector from every node to the next one."""
    neighbours = zip(nodes, nodes[1:] + nodes[:1], strict=True)
    return ray.get(
        [right.total.remote(left.vector.remote(i)) for i, (left, right) in enumerate(neighbours)]
    )


def main() -> None:
    """Create, use and destroy a group, twice."""
    with ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False):
        nodes = [Node.remote() for _ in range(3)]

        group = create_collective_group(nodes, backend="gloo", name="ring")
        print(f"group {group.name!r}: {len(group.actors)} actors, transport {group.backend}")
        assert [found.name for found in get_collective_groups(nodes)] == ["ring"]
        assert pass_around(nodes) == [0.0, 1000.0, 2000.0]

        destroy_collective_group(group)
        print("destroyed; the actors are still alive")
        assert get_collective_groups(nodes) == []

        again = create_collective_group(list(reversed(nodes)), backend="gloo")
        print(f"a new group on the same actors, other ranks: {again.name}")
        assert pass_around(nodes) == [0.0, 1000.0, 2000.0]
        destroy_collective_group(again.name)


if __name__ == "__main__":
    main()
