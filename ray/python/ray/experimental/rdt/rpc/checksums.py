"""Verifies what was pulled: ``RAY_RDT_CHECKSUM=1`` at the consumer.

The producer's agent finds an object's checksum when the first consumer asks, and keeps it. So a
tensor that is changed in place after that fails later pulls. What lands is summed up by the
consumer's copy threads as they go, or, where a transport has moved it, in one go afterwards.
"""

from __future__ import annotations

import logging
from array import array
from typing import Any

from ray.experimental.rdt.common.config import settings
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.failures import TransferFailed
from ray.experimental.rdt.rpc.session import Session


class ChecksumMismatch(TransferFailed):
    """The received bytes differ from the producer's."""


class Expected:
    """The checksum that a producer is asked for.

    Args:
        session: Asks.
        address: The producer's agent.
        key: The object's.
    """

    def __init__(self, session: Session, address: bytes, key: bytes):
        self._asked = session.agent.ask_checksum(address, key)
        self._answer: int | None = None

    def check(self, found: int, deadline: Deadline) -> None:
        """Compares, once the producer has answered.

        Runs on: consumer, the thread that fetches; blocks without the GIL.

        Raises:
            ChecksumMismatch: they differ.
            TimeoutError: no answer before ``deadline``.
            AgentError: the producer is gone.
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
        """As ``check``, of bytes that lie in this process."""
        from ray.experimental.rdt._agent import checksum

        self.check(checksum(addresses, lengths), deadline)


class VerifiedPull:
    """A pull of the agent's whose bytes are verified; if they are wrong, it is made once more.

    Has what the agent's own ``Pull`` has of methods and attributes.
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
        # Asked first: an object that is there for the pull was there for this.
        self._expected = Expected(session, address, key)
        self._start = (address, key, addresses, lengths, True)
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
        """As the agent's. Raises ChecksumMismatch as well."""
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
    """Asks for an object's checksum if this process verifies what it pulls."""
    return Expected(session, address, key) if settings().checksum else None


def pull(
    session: Session,
    address: bytes,
    key: bytes,
    addresses: array[int],
    lengths: array[int],
    keep: Any,
) -> Any:
    """Has the agent pull an object, and verifies it if this process is to.

    Args:
        session: Its agent pulls.
        address: The producer's agent.
        key: The object's.
        addresses: Of the destination, as uint64.
        lengths: Of the same.
        keep: Lives until nobody writes to the destination any more.
    """
    if settings().checksum:
        return VerifiedPull(session, address, key, addresses, lengths, keep)
    started = session.agent.pull(address, key, addresses, lengths)
    started.keep = keep
    return started


def log_retry(session: Session, way: str, error: ChecksumMismatch) -> None:
    """Says that an object is pulled once more."""
    session.log_once(
        f"RDT received wrong bytes over {way} ({error}) and pulls the object once more",
        logging.WARNING,
    )
