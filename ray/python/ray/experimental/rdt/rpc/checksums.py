"""Checksums of pulled objects: ``RAY_RDT_CHECKSUM=1`` at the consumer.

The producer's agent computes an object's checksum for the first consumer and keeps it. So a tensor
that is changed in place later makes later pulls fail. On the agent's lanes, the consumer's copy
threads compute the checksum while they copy. After a transfer of another transport, it is computed
at once.
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.rpc.session import Session

#: The addresses of memory, and their lengths.
_Memory = tuple["array[int]", "array[int]"]


class ChecksumMismatch(TransferFailed):
    """The received bytes differ from the producer's."""


class Expected:
    """The checksum that the producer computes.

    Args:
        session: Sends the request.
        address: The producer's agent.
        key: The object's key.
    """

    def __init__(self, session: Session, address: bytes, key: bytes):
        self._asked = session.agent.ask_checksum(address, key)
        self._answer: int | None = None

    def check(self, found: int, deadline: Deadline) -> None:
        """Compare a checksum with the producer's answer.

        Runs on: consumer, the thread that fetches; blocks without the GIL.

        Raises:
            ChecksumMismatch: They differ.
            TimeoutError: No answer before ``deadline``.
            AgentError: The producer is gone.
        """
        if self._answer is None:
            answer = self._asked.wait(deadline.left_s())
            self._answer = int.from_bytes(answer, "little")
        if found != self._answer:
            raise ChecksumMismatch(
                f"the producer's bytes have the checksum {self._answer:016x}, those that arrived "
                f"{found:016x}"
            )

    def check_memory(self, addresses: array[int], lengths: array[int], deadline: Deadline) -> None:
        """Compute the checksum of memory of this process, and check it."""
        from ray.experimental.rdt._agent import checksum

        self.check(checksum(addresses, lengths), deadline)


class VerifiedPull:
    """A pull of the agent whose bytes are verified; it is repeated once if they are wrong.

    It has the methods and attributes of the agent's ``Pull``.
    """

    def __init__(self, session: Session, address: bytes, key: bytes, memory: _Memory, keep: Any):
        self._session = session
        # Before the pull: an object that exists for the pull existed for this request.
        self._expected = Expected(session, address, key)
        self._start = (address, key, *memory, True)
        self._keep = keep
        self._pull = self._begin()

    def _begin(self) -> Any:
        pull = self._session.agent.pull(*self._start)
        pull.keep = self._keep
        return pull

    @property
    def lane(self) -> str | None:
        lane: str | None = self._pull.lane
        return lane

    @property
    def done(self) -> bool:
        return bool(self._pull.done)

    def cancel(self) -> None:
        self._pull.cancel()

    def wait(self, timeout_s: float) -> None:
        """Wait as the agent's ``Pull`` does. Raises ChecksumMismatch as well."""
        deadline = Deadline.after(timeout_s)
        self._pull.wait(timeout_s)
        try:
            self._expected.check(self._pull.checksum, deadline)
            return
        except ChecksumMismatch as error:
            log_retry(self._session, f"lane {self.lane}", error)
        self._pull = self._begin()
        self._pull.wait(deadline.left_s())
        self._expected.check(self._pull.checksum, deadline)


def expected(session: Session, address: bytes, key: bytes) -> Expected | None:
    """Request an object's checksum if this process verifies its pulls, else return None."""
    return Expected(session, address, key) if settings().checksum else None


def pull(
    session: Session,
    address: bytes,
    key: bytes,
    addresses: array[int],
    lengths: array[int],
    keep: Any,
) -> Any:
    """Start a pull of the agent, which is verified if this process verifies its pulls.

    Args:
        session: Its agent pulls.
        address: The producer's agent.
        key: The object's key.
        addresses: The addresses of the destination, as uint64.
        lengths: Their lengths.
        keep: An object that lives until no thread writes to the destination any more.
    """
    if settings().checksum:
        return VerifiedPull(session, address, key, (addresses, lengths), keep)
    started = session.agent.pull(address, key, addresses, lengths)
    started.keep = keep
    return started


def log_retry(session: Session, way: str, error: ChecksumMismatch) -> None:
    """Log that an object is pulled once more."""
    session.log_once(
        f"RDT received wrong bytes over {way} ({error}) and pulls the object once more",
        logging.WARNING,
    )
