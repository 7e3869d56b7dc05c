"""Location of an object's tensors. A task's reply reports it to the owner."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Location:
    """The place of an object's tensors.

    Attributes:
        address: The address of the producer's agent.
        key: The object's key at that agent.
        nbytes: The bytes that a pull moves.
        regions: The bytes of each region if the object is worth a prefetch, else None.
        is_eager: Whether the value contains the tensors' bytes.
    """

    address: bytes
    key: bytes = field(repr=False)
    nbytes: int
    regions: tuple[int, ...] | None = None
    is_eager: bool = False
