"""A group for ``ray.util.collective``. Importing this module imports ``ray.util.collective``.

The first operation that needs a process group creates it: one of all members, one of each two. Most
groups only transfer RDT objects and need none. All methods run on the user's threads and block.
Every member has to call the same collective operations. ``send`` and ``recv`` are between two
members, and the others need not take part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ray.util.collective import types
from ray.util.collective.collective_group.base_collective_group import BaseGroup

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.groups import entered_groups

if TYPE_CHECKING:
    import torch

_TIMEOUT_S = 1800.0  # torch's own for gloo

_Tensors = Sequence[Any]


class RDTGroup(BaseGroup):
    """The collective operations of one group in one member's process."""

    def __init__(self, world_size: int, rank: int, group_name: str):
        super().__init__(world_size, rank, group_name)
        self._group, self._transport = entered_groups.by_name[group_name]
        self._of_all = _ProcessGroup(self._make_group_of_all)
        self._pairs = [
            _ProcessGroup(functools.partial(self._make_pair, other)) for other in range(world_size)
        ]

    @classmethod
    def backend(cls) -> str:
        return entered_groups.BACKEND

    @classmethod
    def check_backend_availability(cls) -> bool:
        """See BaseGroup. Members check for torch before a group is created."""
        return True

    def destroy_group(self) -> None:
        for each in (self._of_all, *self._pairs):
            each.end(self._transport.end_group)

    def allreduce(self, tensor: _Tensors, allreduce_options: Any = types.AllReduceOptions) -> None:
        from torch.distributed import AllreduceOptions

        options = AllreduceOptions()
        options.reduceOp = _torch_op(allreduce_options.reduceOp)
        self._of_all.get().allreduce([_only(tensor)], options).wait()

    def barrier(self, barrier_options: Any = types.BarrierOptions) -> None:
        """See BaseGroup. Reduces one byte, since torch's own barrier would need a device."""
        self._of_all.get().allreduce([self._transport.byte()]).wait()

    def reduce(self, tensor: _Tensors, reduce_options: Any = types.ReduceOptions) -> None:
        """See BaseGroup. Only the root's tensor changes."""
        mine = _only(tensor)
        root = reduce_options.root_rank
        scratch = mine if self._rank == root else mine.detach().clone()
        self._reduce(scratch, root, reduce_options.reduceOp)

    def allgather(
        self,
        tensor_list: _Tensors,
        tensor: _Tensors,
        allgather_options: Any = types.AllGatherOptions,
    ) -> None:
        self._of_all.get().allgather([_list(tensor_list)], [_only(tensor)]).wait()

    def broadcast(self, tensor: _Tensors, broadcast_options: Any = types.BroadcastOptions) -> None:
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank = broadcast_options.root_rank
        self._of_all.get().broadcast([_only(tensor)], options).wait()

    def reducescatter(
        self,
        tensor: _Tensors,
        tensor_list: _Tensors,
        reducescatter_options: Any = types.ReduceScatterOptions,
    ) -> None:
        """See BaseGroup. Uses one reduction per rank, as gloo requires. Inputs do not change."""
        output = _only(tensor)
        inputs = _list(tensor_list)
        if output.shape != inputs[self._rank].shape:
            raise ValueError(
                f"the output has shape {tuple(output.shape)}, the input of rank {self._rank} has "
                f"{tuple(inputs[self._rank].shape)}"
            )
        for root, part in enumerate(inputs):
            scratch = part.detach().clone()
            self._reduce(scratch, root, reducescatter_options.reduceOp)
            if root == self._rank:
                output.copy_(scratch)

    def send(self, tensor: _Tensors, send_options: types.SendOptions) -> None:
        self._exchange("send", tensor, send_options.dst_rank)

    def recv(self, tensor: _Tensors, recv_options: types.RecvOptions) -> None:
        self._exchange("recv", tensor, recv_options.src_rank)

    def _reduce(self, tensor: torch.Tensor, root: int, operation: types.ReduceOp) -> None:
        from torch.distributed import ReduceOptions

        options = ReduceOptions()
        options.rootRank = root
        options.reduceOp = _torch_op(operation)
        self._of_all.get().reduce([tensor], options).wait()

    def _exchange(self, operation: str, tensor: _Tensors, other: int) -> None:
        """Send to another rank or receive from it."""
        pair = self._pairs[other].get()
        getattr(pair, operation)([_only(tensor)], int(other > self._rank), 0).wait()

    def _make_group_of_all(self) -> tuple[Any, Any]:
        return self._transport.connector.make_group(
            self._group.id, self._rank, self._world_size, _TIMEOUT_S, has_collectives=True
        )

    def _make_pair(self, other: int) -> tuple[Any, Any]:
        """Create the process group of a pair. The lower rank of the group is rank 0 of the pair."""
        name, rank = self._group.pair_name(other), int(self._rank > other)
        return self._transport.connector.make_group(
            name, rank, 2, _TIMEOUT_S, has_collectives=False
        )


class _ProcessGroup:
    """A process group that is created at its first use.

    Args:
        make: Returns the process group, and an object that has to live as long.
    """

    def __init__(self, make: Callable[[], tuple[Any, Any]]):
        self._make = make
        self._lock = threading.Lock()
        self._made: tuple[Any, Any] | None = None

    def get(self) -> Any:
        """Return the process group. Blocks until the other ranks use it as well."""
        with self._lock:
            if self._made is None:
                self._made = self._make()
            return self._made[0]

    def end(self, end_group: Callable[[Any], None]) -> None:
        """End the process group if it was used."""
        with self._lock:
            made, self._made = self._made, None
        if made is not None:
            end_group(made[0])


def _torch_op(operation: types.ReduceOp) -> Any:
    from torch.distributed import ReduceOp

    return getattr(ReduceOp, operation.name)  # SUM, PRODUCT, MIN or MAX


def _only(tensors: _Tensors) -> torch.Tensor:
    """Return the tensor of a list of one, as Ray passes it."""
    (tensor,) = tensors
    return _as_tensor(tensor)


def _list(tensor_lists: _Tensors) -> list[torch.Tensor]:
    (tensors,) = tensor_lists
    return [_as_tensor(tensor) for tensor in tensors]


def _as_tensor(value: Any) -> torch.Tensor:
    """Return a tensor over the memory of a tensor or NumPy array."""
    import torch

    return value if isinstance(value, torch.Tensor) else torch.from_numpy(value)
