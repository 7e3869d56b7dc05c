"""Types of _tensors.pyx, which has the documentation."""

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, final

import torch

from ray import cloudpickle

REQUIRES_GRAD: int
PARAMETER: int
CONJUGATED: int
NEGATED: int

Row = tuple[int, int, torch.dtype, tuple[int, ...], tuple[int, ...] | None, int]

@final
class Table:
    regions: Final[array[int]]
    dtypes: Final[tuple[torch.dtype, ...]]
    devices: Final[dict[int, str]]
    nbytes: Final[int]
    @property
    def rows(self) -> list[Row]: ...
    def __len__(self) -> int: ...

@final
class Layout:
    table: Final[Table]
    addresses: Final[array[int]]
    owners: Final[list[torch.UntypedStorage | None]]
    offsets: Final[array[int]]
    runs: Final[dict[int, tuple[array[int], int]]]
    storages: Final[array[int]]
    guards: Final[array[int]]
    def is_unchanged(self) -> bool: ...

class Pickler(cloudpickle.CloudPickler):
    tensors: list[Any]
    is_parameter: list[bool]
    def __init__(
        self, stream: Any, buffer_callback: Callable[[Any], None], wanted: Any
    ) -> None: ...

def check_storage(tensor: torch.Tensor) -> None: ...
def is_carried(tensor: torch.Tensor, devices: frozenset[str] | None = None) -> bool: ...
def lay_out(
    tensors: list[torch.Tensor], is_parameter: list[bool] | None = None, may_gather: bool = True
) -> Layout: ...
def load_table(
    regions: bytes,
    rows: bytes,
    dims: bytes,
    dtypes: tuple[torch.dtype, ...],
    devices: dict[int, str],
) -> Table: ...
def place(
    regions: array[int],
    direct: Mapping[int, torch.Tensor],
    own_block_bytes: int,
    alignment: int,
    allocate: Callable[[int], Any],
) -> tuple[list[tuple[Any, int]], array[int]]: ...
def build_tensors(
    table: Table,
    places: Sequence[tuple[Any, int]],
    ready: Mapping[int, torch.Tensor] | None = None,
) -> list[torch.Tensor]: ...
def tensor_over(
    address: int, nbytes: int, device_type: int, device_index: int, owner: Any
) -> torch.Tensor: ...
def apply_flags(tensor: torch.Tensor, flags: int) -> torch.Tensor: ...
def restore(inband: Any, buffers: Sequence[Any], tensors: Sequence[Any]) -> Any: ...
