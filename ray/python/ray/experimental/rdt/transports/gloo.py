"""gloo: CPU tensors over torch's gloo process groups, TCP between the nodes' Ray addresses.

Gloo does not authenticate peers and does not encrypt. If Ray uses TLS, gloo is refused unless
``RAY_RDT_ALLOW_CLEAR_TCP=1``.
"""

from __future__ import annotations

import contextlib
import ctypes
from array import array
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt._agent import read_memory
from ray.experimental.rdt.common import ray_core
from ray.experimental.rdt.common.once import Once
from ray.experimental.rdt.groups.membership import Membership
from ray.experimental.rdt.transports import base
from ray.experimental.rdt.transports.process_group.link import CONSUMER, MAX_TAG, PRODUCER
from ray.experimental.rdt.transports.process_group.transport import ProcessGroupTransport

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.rpc.session import Session


class GlooBackend:
    """A ``Backend`` of gloo process groups, which share one gloo device and its socket thread.

    Args:
        host: The address of this node that others reach.
    """

    capabilities = base.Capabilities("gloo", frozenset({"cpu"}), two_sided=True)
    has_tags = True

    def __init__(self, host: str):
        self._host = host
        self._device: Once[Any] = Once()

    def check_available(self) -> None:
        base.check_clear_allowed("gloo does not encrypt")
        try:
            import torch.distributed
        except ImportError as error:
            raise base.TransportUnavailable(
                f"gloo needs torch, which this process cannot import: {error}"
            ) from error
        if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
            raise base.TransportUnavailable("this build of torch has no gloo")

    def make(
        self, store: Any, rank: int, size: int, timeout_s: float, has_collectives: bool
    ) -> Any:
        from torch.distributed import ProcessGroupGloo

        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_s)
        create = partial(ProcessGroupGloo.create_device, hostname=self._host)
        options._devices = [self._device.get(create)]
        if not has_collectives:
            options._threads = 0  # send and receive need none
        return ProcessGroupGloo(store, rank, size, options)

    def kill(self, group: Any) -> None:
        """See ``Backend``.

        Gloo's own abort wakes no waits. A wait that times out closes all connections of a process
        group and wakes the waits for messages that have not begun.
        """
        if group.size() == 1:
            return
        other = (group.rank() + 1) % group.size()
        with contextlib.suppress(RuntimeError):
            self.wait(group.recv([self.empty(1)], other, MAX_TAG), 0.001)

    def send(self, group: Any, tensor: torch.Tensor, tag: int) -> Any:
        return group.send([tensor], CONSUMER, tag)

    def receive(self, group: Any, tensor: torch.Tensor, tag: int) -> Any:
        return group.recv([tensor], PRODUCER, tag)

    def wait(self, work: Any, timeout_s: float) -> None:
        work.wait(timedelta(seconds=timeout_s))

    def transfer_context(self, after: base.Events) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def empty(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def unsupported_reason(self, buffers: base.Buffers) -> str:
        others = {str(b.device) for b in buffers if b.device.type != "cpu"}
        return f"gloo carries CPU tensors only, not those on {sorted(others)}" if others else ""

    def pack(self, buffers: base.Buffers, slot: torch.Tensor) -> None:
        """See ``Backend``. Raises AgentError for memory that is gone, as gloo's own sends fail.

        Torch's copy is not used, because it would start an OpenMP team per thread.
        """
        addresses = array("Q", [buffer.data_ptr() for buffer in buffers])
        read_memory(addresses, array("Q", [buffer.numel() for buffer in buffers]), slot.data_ptr())

    def unpack(self, slot: torch.Tensor, buffers: base.Buffers) -> None:
        at = slot.data_ptr()
        for buffer in buffers:
            ctypes.memmove(buffer.data_ptr(), at, buffer.numel())
            at += buffer.numel()


class GlooTransport(ProcessGroupTransport):
    """The transport that users name "gloo". ``host`` is the node's Ray address by default."""

    def __init__(self, session: Session, host: str | None = None, groups: Membership | None = None):
        super().__init__(GlooBackend(host or ray_core.node_ip_address()), session, groups)
