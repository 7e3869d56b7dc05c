"""Transfers over the lanes of the agent.

Runs on: consumer, the thread that deserializes.
"""

from __future__ import annotations

from collections.abc import Callable

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.consumer.receive_buffers import Destination, ReceiveBuffers, Targets
from ray.experimental.rdt.rpc import checksums
from ray.experimental.rdt.rpc.session import Session


class AgentPull(checksums.Pull):
    """A pull of the agent that moves the bytes of one object into receive buffers."""

    def __init__(self, session: Session, address: bytes, key: bytes, buffers: ReceiveBuffers):
        super().__init__(session, address, key, buffers.addresses, buffers.lengths, buffers)
        self.buffers = buffers


class AgentTransfer:
    """The agent brings the bytes. See ``transfer.Transfer``.

    Args:
        pull: A pull that began before the fetch, if any. It may have failed long ago, for a reason
            that has passed.
    """

    def __init__(
        self,
        session: Session,
        head: Descriptor,
        destination: Destination,
        pull: AgentPull | None = None,
    ):
        self._session = session
        self._head = head
        self._destination = destination
        self._pull = pull
        self._is_parked = False

    @property
    def lane(self) -> str:
        return self._pull.lane if self._pull is not None else ""

    def start(self, deadline: Deadline) -> None:
        if self._pull is None:
            buffers = self._destination.buffers(may_split=True)
            head = self._head
            self._pull = AgentPull(self._session, head.address, head.key, buffers)

    def finish(self, deadline: Deadline) -> Targets:
        assert self._pull is not None, "start comes before finish"
        self._pull.wait(deadline)
        return self._destination.deliver(self._pull.buffers)

    def park(self, keep: Callable[[bytes, AgentPull, int], bool]) -> None:
        """Leave the pull to a later fetch. A pull into tensors of the user's is not left."""
        if self._pull is not None and not self._pull.buffers.has_user_memory:
            self._is_parked = keep(self._head.key, self._pull, self._head.nbytes)

    def abandon(self) -> None:
        if self._pull is not None and not self._is_parked:
            self._pull.abandon()
