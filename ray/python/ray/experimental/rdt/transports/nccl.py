"""nccl: CUDA tensors over torch's NCCL process groups.

Not run on a GPU so far: what is shared with gloo is tested there, the calls to torch.cuda and NCCL
are written from their documentation.

An NCCL communicator runs its operations in one order, the same at both ends, so a link carries one
transfer at a time; a pair makes a few links. A link belongs to the first GPU that each process
sees, which is the one that Ray gave to the actor; tensors on others are refused and take another
lane.
"""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.config import settings
from ray.experimental.rdt.groups.membership import Membership
from ray.experimental.rdt.transports.base import Capabilities
from ray.experimental.rdt.transports.link import Buffers
from ray.experimental.rdt.transports.process_group import ProcessGroupTransport

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.session import Session

# Torch's watchdog ends the process when an operation outlasts this, so it never may: our own
# deadlines abort the communicator.
_NEVER = timedelta(days=365)

_DEVICE = "cuda:0"
_FIRST_POLL_S = 20e-6
_LAST_POLL_S = 1e-3


class NcclBackend:
    """NCCL process groups on the first GPU that the process sees."""

    capabilities = Capabilities("nccl", frozenset({"cuda"}), two_sided=True, needs_group=True)
    has_tags = False

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
        """See ``Backend``. The communicator itself is made by the first operation."""
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        return ProcessGroupNCCL(store, rank, size, options)

    def kill(self, group: Any) -> None:
        """See ``Backend``. The abort ends the kernels that are running."""
        with contextlib.suppress(RuntimeError):
            group.abort()

    def wait(self, work: Any, timeout_s: float) -> None:
        """See ``Backend``.

        An event on the caller's stream tells the end: torch's own wait with a timeout would leave
        the process to its watchdog.
        """
        import torch

        work.wait()  # the stream waits from here on, not this thread
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # on the current stream, see ``turn``
        event.record()
        deadline, pause = time.monotonic() + timeout_s, _FIRST_POLL_S
        while not event.query():  # type: ignore[no-untyped-call]
            if time.monotonic() >= deadline:
                raise TimeoutError(f"no NCCL message was completed within {timeout_s:g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_S)

    def turn(self) -> AbstractContextManager[None]:
        """See ``Backend``. The transfer's thread works on the stream of its caller."""
        import torch

        return _on_stream(torch.cuda.current_stream(_DEVICE))

    def empty(self, nbytes: int) -> torch.Tensor:
        """See ``Backend``."""
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, device=_DEVICE)

    def reject(self, buffers: Buffers) -> str:
        """See ``Backend``."""
        others = {str(b.device) for b in buffers} - {_DEVICE}
        return f"nccl links are on {_DEVICE}, the tensors on {sorted(others)}" if others else ""

    def pack(self, buffers: Buffers, slot: torch.Tensor) -> None:
        """See ``Backend``."""
        import torch

        torch.cat(list(buffers), out=slot)

    def unpack(self, slot: torch.Tensor, buffers: Buffers) -> None:
        """See ``Backend``."""
        at = 0
        for buffer in buffers:
            buffer.copy_(slot[at : at + buffer.numel()])
            at += buffer.numel()


class NcclTransport(ProcessGroupTransport):
    """The transport that users name "nccl".

    Args:
        session: What peers are asked through.
        groups: The collective groups of this process.
    """

    def __init__(self, session: Session, groups: Membership | None = None):
        super().__init__(NcclBackend(), session, groups)


@contextlib.contextmanager
def _on_stream(stream: torch.cuda.Stream) -> Any:
    import torch

    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
