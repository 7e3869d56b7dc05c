"""nccl: CUDA tensors over torch's NCCL process groups.

An NCCL communicator runs its operations in the same order at both ends. So a link carries one
transfer at a time, and a pair makes several links. A link belongs to the first GPU that each
process sees, which Ray assigned to the actor. Tensors on other GPUs are refused and take another
lane.

Not run on a GPU so far: written from the documentation of torch and NCCL.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ray.experimental.rdt.accelerators.base import Accelerator
from ray.experimental.rdt.accelerators.cuda import CudaAccelerator
from ray.experimental.rdt.accelerators.events import Event
from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.groups.membership import Membership
from ray.experimental.rdt.transports import base
from ray.experimental.rdt.transports.process_group.link import PRODUCER
from ray.experimental.rdt.transports.process_group.transport import ProcessGroupTransport

if TYPE_CHECKING:
    import torch

    from ray.experimental.rdt.rpc.session import Session

# Torch's watchdog ends the process when an operation takes longer than this. RDT's own deadlines
# abort the communicator.
_NEVER = timedelta(days=365)

_DEVICE = "cuda:0"

#: Settings that keep torch from ending the process when a communicator fails, which only ends a
#: link here. Torch's watchdog would end it at once, and the watchdog's monitor eight minutes later.
_KEEP_PROCESS_ALIVE = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
_environment_lock = threading.Lock()


class NcclBackend:
    """A ``Backend`` of NCCL process groups on ``device``, the first GPU that the process sees."""

    capabilities = base.Capabilities("nccl", frozenset({"cuda"}), two_sided=True)
    has_tags = False

    def __init__(self, accelerator: Accelerator, device: torch.device):
        self._accelerator = accelerator
        self._device = device
        self._lock = threading.Lock()
        self._idle_streams: list[Any] = []

    def check_available(self) -> None:
        base.check_clear_allowed("nccl does not encrypt between nodes")
        try:
            import torch.distributed
        except ImportError as error:
            raise base.TransportUnavailable(
                f"nccl needs torch, which this process cannot import: {error}"
            ) from error
        if not torch.cuda.is_available():
            raise base.TransportUnavailable("nccl needs an NVIDIA GPU, and this process has none")
        if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
            raise base.TransportUnavailable("this build of torch has no NCCL")

    def make(
        self, store: Any, rank: int, size: int, timeout_s: float, has_collectives: bool
    ) -> Any:
        """See ``Backend``. The first operation makes the communicator itself.

        The constructor reads ``_KEEP_PROCESS_ALIVE`` from the environment, where they are only as
        long as it runs; nothing else of the environment changes, and process groups of the user's
        keep what the user has set. (With ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` or
        ``TORCH_NCCL_DESYNC_DEBUG=1`` torch does not heed the first.)
        """
        from torch.distributed import ProcessGroupNCCL

        self._check_gpus_differ(store, rank, size)
        options = ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        with _environment(_KEEP_PROCESS_ALIVE):
            return ProcessGroupNCCL(store, rank, size, options)

    def _check_gpus_differ(self, store: Any, rank: int, size: int) -> None:
        sharing = self._accelerator.sharing
        if sharing is None:
            return
        store.set(f"gpu/{rank}", sharing.driver.identity(self._device).encode())
        ranks: dict[bytes, int] = {}
        for other in range(size):
            identity = store.get(f"gpu/{other}")
            if identity in ranks:
                raise base.TransportUnavailable(
                    f"ranks {ranks[identity]} and {other} are on one GPU, {identity.decode()}, "
                    "and NCCL connects different ones only"
                )
            ranks[identity] = other

    def kill(self, group: Any) -> None:
        """See ``Backend``. The abort ends the kernels that are running."""
        with contextlib.suppress(RuntimeError):
            group.abort()

    def send(self, group: Any, tensor: torch.Tensor, tag: int) -> Event:
        """Queue a broadcast from the producer on the transfer's stream (see ``transfer_context``).

        A synchronous broadcast, since torch runs point-to-point operations and asynchronous
        collectives on streams of its pool. The pool has 32 streams for each device, so the user may
        have the same one, and the user's work on it would then wait for the other process.
        """
        from torch.distributed import BroadcastOptions

        options: Any = BroadcastOptions()
        options.rootRank = PRODUCER
        options.asyncOp = False
        work = group.broadcast([tensor], options)
        if work is not None:  # torch before 2.8, which uses its own stream all the same
            work.wait()
        return self._accelerator.record(self._device)

    receive = send

    def wait(self, work: Event, timeout_s: float) -> None:
        """See ``Backend``. After a timeout of torch's wait, its watchdog would end the process."""
        work.wait(timeout_s)

    @contextlib.contextmanager
    def transfer_context(self, after: base.Events) -> Iterator[None]:
        """See ``Backend``. Each transfer has a stream of its own while it runs.

        Its operations wait for the other end. On a stream that others use, the default one for
        instance, their work would wait too: two processes that pull from each other would each send
        only after they had received.
        """
        with self._lock:
            idle = self._idle_streams.pop() if self._idle_streams else None
        stream = idle if idle is not None else self._accelerator.new_stream(self._device)
        with self._accelerator.on(stream):
            for event in after:
                event.make_stream_wait()
            yield
        # Used again, because torch's allocator keeps freed memory for each stream apart. Not after
        # an error: the stream may wait for a message that never comes.
        with self._lock:
            self._idle_streams.append(stream)

    def empty(self, nbytes: int) -> torch.Tensor:
        return self._accelerator.empty(nbytes, self._device)

    def unsupported_reason(self, buffers: base.Buffers) -> str:
        others = {str(b.device) for b in buffers} - {str(self._device)}
        return (
            f"nccl links are on {self._device}, the tensors on {sorted(others)}" if others else ""
        )

    def pack(self, buffers: base.Buffers, slot: torch.Tensor) -> None:
        import torch

        torch.cat(list(buffers), out=slot)

    def unpack(self, slot: torch.Tensor, buffers: base.Buffers) -> None:
        """See ``Backend``. Returns when the bytes are in place.

        Not on the transfer's stream, where it would wait for the messages that are in flight.
        """
        ends = list(itertools.accumulate(buffer.numel() for buffer in buffers))
        pairs = [(buffer, slot[end - buffer.numel() : end]) for buffer, end in zip(buffers, ends)]
        copied = self._accelerator.copy(pairs, self._device)
        copied.wait(settings().peer_timeout_s)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the context lasts. Runs on: any thread."""
    with _environment_lock:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class NcclTransport(ProcessGroupTransport):
    """The transport that users name "nccl"."""

    def __init__(self, session: Session, groups: Membership | None = None):
        import torch

        backend = NcclBackend(CudaAccelerator(), torch.device(_DEVICE))
        super().__init__(backend, session, groups)
