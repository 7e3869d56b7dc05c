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
from ray.experimental.rdt.common.thread_role import without_turn
from ray.experimental.rdt.rpc.session import Session


class ChecksumMismatch(TransferFailed):
    """The received bytes differ from the producer's."""


class Expected:
    """The checksum that the producer computes."""

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


class Pull:
    """A pull of the agent in progress. It is repeated once if this process finds wrong bytes.

    Args:
        addresses: The addresses of the destination, as uint64.
        lengths: Their lengths.
        keep: An object that lives until no thread writes to the destination any more.
    """

    def __init__(
        self,
        session: Session,
        address: bytes,
        key: bytes,
        addresses: array[int],
        lengths: array[int],
        keep: Any,
    ):
        self._session = session
        # Before the pull: an object that exists for the pull existed for this request.
        self._expected = expected(session, address, key)
        self._start = (address, key, addresses, lengths, self._expected is not None)
        self._keep = keep
        self._pull = self._begin()

    def _begin(self) -> Any:
        pull = self._session.agent.pull(*self._start)
        pull.keep = self._keep
        return pull

    @property
    def lane(self) -> str:
        return self._pull.lane or ""

    def wait(self, deadline: Deadline) -> None:
        """Wait as the agent's ``Pull`` does. Raises ChecksumMismatch as well."""
        with without_turn():
            self._pull.wait(deadline.left_s())
            if self._expected is None:
                return
            try:
                self._expected.check(self._pull.checksum, deadline)
                return
            except ChecksumMismatch as error:
                log_retry(self._session, f"lane {self.lane}", error)
            self._pull = self._begin()
            self._pull.wait(deadline.left_s())
            self._expected.check(self._pull.checksum, deadline)

    def abandon(self) -> None:
        if not self._pull.done:
            self._pull.cancel()


def expected(session: Session, address: bytes, key: bytes) -> Expected | None:
    """Request an object's checksum if this process verifies its pulls, else return None."""
    return Expected(session, address, key) if settings().checksum else None


def log_retry(session: Session, way: str, error: ChecksumMismatch) -> None:
    session.log_once(
        f"RDT received wrong bytes over {way} ({error}) and pulls the object once more",
        logging.WARNING,
    )
