"""nccl: CUDA tensors over torch's NCCL process groups.

Not run on a GPU so far: what is shared with gloo is tested there, what is here with another
accelerator and gloo in NCCL's place. The calls to torch.cuda and NCCL are written from their
documentation.

An NCCL communicator runs its operations in one order, the same at both ends, so a link carries one
transfer at a time; a pair makes a few links. A link belongs to the first GPU that each process
sees, which is the one that Ray gave to the actor; tensors on others are refused and take another
lane.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.cuda import CudaAccelerator
from ray.experimental.rdt.config import settings
from ray.experimental.rdt.groups.membership import Membership
from ray.experimental.rdt.transports.base import Capabilities, TransportUnavailable
from ray.experimental.rdt.transports.link import Buffers
from ray.experimental.rdt.transports.process_group import ProcessGroupTransport

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.session import Session

# Torch's watchdog ends the process when an operation outlasts this, so it never may: our own
# deadlines abort the communicator.
_NEVER = timedelta(days=365)

_DEVICE = "cuda:0"


class NcclBackend:
    """NCCL process groups on the first GPU that the process sees.

    Args:
        accelerator: What knows the GPU's streams and memory.
        device: The GPU.
    """

    capabilities = Capabilities("nccl", frozenset({"cuda"}), two_sided=True, needs_group=True)
    has_tags = False

    def __init__(self, accelerator: Accelerator, device: torch.device):
        self._accelerator = accelerator
        self._device = device

    def unavailable(self) -> str:
        """See ``Backend``."""
        if not settings().clear_tcp:
            return (
                "Ray is told to use TLS and nccl sends in the clear between nodes; "
                "RAY_RDT_ALLOW_CLEAR_TCP=1 allows it"
            )
        try:
            import torch.distributed
        except ImportError as error:
            return f"nccl needs torch, which this process cannot import: {error}"
        if not torch.cuda.is_available():
            return "nccl needs an NVIDIA GPU, and this process has none"
        if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
            return "this build of torch has no NCCL"
        return ""

    def make(self, store: Any, rank: int, size: int, timeout_s: float) -> Any:
        """See ``Backend``. The communicator itself is made by the first operation.

        Raises:
            TransportUnavailable: two ranks are on one GPU, which NCCL cannot connect.
        """
        from torch.distributed import ProcessGroupNCCL

        self._check_gpus_differ(store, rank, size)
        options = ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        return ProcessGroupNCCL(store, rank, size, options)

    def _check_gpus_differ(self, store: Any, rank: int, size: int) -> None:
        sharing = self._accelerator.sharing
        if sharing is None:
            return
        store.set(f"gpu/{rank}", sharing.identity(self._device).encode())
        ranks: dict[bytes, int] = {}
        for other in range(size):
            identity = store.get(f"gpu/{other}")
            if identity in ranks:
                raise TransportUnavailable(
                    f"ranks {ranks[identity]} and {other} are on one GPU, {identity.decode()}, "
                    "and NCCL connects different ones only"
                )
            ranks[identity] = other

    def kill(self, group: Any) -> None:
        """See ``Backend``. The abort ends the kernels that are running."""
        with contextlib.suppress(RuntimeError):
            group.abort()

    def wait(self, work: Any, timeout_s: float) -> None:
        """See ``Backend``.

        An event on the caller's stream (see ``turn``) tells the end: torch's own wait with a
        timeout would leave the process to its watchdog.
        """
        work.wait()  # the stream waits from here on, not this thread
        self._accelerator.record(self._device).wait(timeout_s)

    def turn(self) -> AbstractContextManager[None]:
        """See ``Backend``. The transfer's thread works on the stream of its caller."""
        import torch

        return _on_stream(torch.cuda.current_stream(self._device))

    def empty(self, nbytes: int) -> torch.Tensor:
        """See ``Backend``."""
        return self._accelerator.empty(nbytes, self._device)

    def reject(self, buffers: Buffers) -> str:
        """See ``Backend``."""
        others = {str(b.device) for b in buffers} - {str(self._device)}
        return (
            f"nccl links are on {self._device}, the tensors on {sorted(others)}" if others else ""
        )

    def pack(self, buffers: Buffers, slot: torch.Tensor) -> None:
        """See ``Backend``."""
        import torch

        torch.cat(list(buffers), out=slot)

    def unpack(self, slot: torch.Tensor, buffers: Buffers) -> None:
        """See ``Backend``. Returns when the bytes are in place."""
        at = 0
        for buffer in buffers:
            buffer.copy_(slot[at : at + buffer.numel()])
            at += buffer.numel()
        self._accelerator.record(self._device).wait(settings().peer_timeout_s)


class NcclTransport(ProcessGroupTransport):
    """The transport that users name "nccl".

    Args:
        session: What peers are asked through.
        groups: The collective groups of this process.
    """

    def __init__(self, session: Session, groups: Membership | None = None):
        import torch

        backend = NcclBackend(CudaAccelerator(), torch.device(_DEVICE))
        super().__init__(backend, session, groups)


@contextlib.contextmanager
def _on_stream(stream: torch.cuda.Stream) -> Any:
    import torch

    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
