"""Regions of host memory that are received into several target tensors.

Rows of one weight, or views of one bucket, are one region at the producer. The user may have a
target tensor for each of them. The agent takes a list of spans, so it writes to each directly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.experimental.rdt._tensors import CONJUGATED, NEGATED, Table
from ray.experimental.rdt.serialization.layout import tenants

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt._tensors import Row

    Targets = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Spread:
    """The target tensors of one region.

    Attributes:
        lead: The number of bytes at its start that belong to no tensor.
        parts: The targets of the other bytes, in their order.
        arrived: For each tensor in the region, by its number, the target that receives its bytes.
            Tensors of the same bytes share one target; the other targets are copied into.
    """

    lead: int
    parts: Sequence[torch.Tensor]
    arrived: Mapping[int, torch.Tensor]


def takes_bytes(target: torch.Tensor, row: Row) -> bool:
    """Tell whether a target can hold a tensor's bytes exactly as they are sent."""
    _, _, _, _, stride, flags = row
    is_dense = stride is None and not flags & (CONJUGATED | NEGATED)
    return is_dense and target.is_contiguous() and not (target.is_conj() or target.is_neg())


def find_spreads(
    table: Table, targets: Targets | None, direct: Mapping[int, torch.Tensor]
) -> dict[int, Spread]:
    """Return the regions that targets cover without a gap, each byte once."""
    if targets is None or len(direct) == len(table.regions):
        return {}
    found = (
        (region, _spread(table, targets, region, rows))
        for region, rows in tenants(table).items()
        if region not in direct and region not in table.devices
    )
    return {region: spread for region, spread in found if spread is not None}


def _spread(table: Table, targets: Targets, region: int, rows: list[int]) -> Spread | None:
    rows = sorted(rows, key=lambda index: (table.rows[index][1], -targets[index].nbytes))
    lead = at = table.rows[rows[0]][1]
    parts: list[torch.Tensor] = []
    arrived: dict[int, torch.Tensor] = {}
    last = None
    for index in rows:
        target, row = targets[index], table.rows[index]
        if not target.is_cpu or not takes_bytes(target, row):
            return None
        span = (row[1], target.dtype, target.shape)
        if span == last:
            arrived[index] = parts[-1]
        elif row[1] == at:
            arrived[index] = target
            parts.append(target)
            at += target.nbytes
            last = span
        else:
            return None
    return Spread(lead, parts, arrived) if at == table.regions[region] else None


def spans(spread: Spread, scratch: int) -> Iterator[tuple[int, int]]:
    """Yield the addresses and sizes that a region is received at; ``scratch`` takes its lead."""
    if spread.lead:
        yield scratch, spread.lead
    for part in spread.parts:
        yield part.data_ptr(), part.nbytes
