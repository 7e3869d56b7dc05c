"""The fallback from one candidate of a transfer to the next.

Runs on: consumer, the thread that deserializes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.descriptor import Descriptor
from ray.experimental.rdt.common.errors import RDTError
from ray.experimental.rdt.common.failures import raise_if_interrupt
from ray.experimental.rdt.consumer.agent_transfer import AgentPull, AgentTransfer
from ray.experimental.rdt.consumer.planner import STRICT, Candidate, Fallback, Kind, may_fall_back
from ray.experimental.rdt.consumer.receive_buffers import Targets
from ray.experimental.rdt.consumer.transfer import Transfer, TransferServices
from ray.experimental.rdt.rpc import checksums
from ray.experimental.rdt.transports.base import TransportUnavailable

logger = logging.getLogger("ray.rdt")


class TransportFallbackChain:
    """A transfer by the first candidate that serves. See ``transfer.Transfer``."""

    def __init__(
        self,
        services: TransferServices,
        head: Descriptor,
        device_type: str,
        candidates: Sequence[Candidate],
        make: Callable[[Candidate], Transfer],
    ):
        self._session = services.session
        self._policy = services.policy
        self._head = head
        self._device_type = device_type
        self._make = make
        self._left = list(candidates)
        self._candidate: Candidate | None = None
        self._attempt: Transfer | None = None

    @property
    def lane(self) -> str:
        return self._attempt.lane if self._attempt is not None else ""

    def start(self, deadline: Deadline) -> None:
        """Start the first candidate that can be started.

        Raises:
            RDTError: The named transport cannot serve, and ``RAY_RDT_STRICT_TRANSPORT=1``.
            TransportUnavailable: No candidate is left.
        """
        while True:
            candidate = self._candidate = self._next()
            attempt = self._attempt = self._make(candidate)
            try:
                attempt.start(_limit(candidate, deadline))
                return
            except Exception as error:  # a transport's library may raise any
                raise_if_interrupt(error)
                if not self._give_up(candidate, attempt, error, deadline):
                    raise

    def finish(self, deadline: Deadline) -> Targets:
        while True:
            candidate, attempt = self._candidate, self._attempt
            assert candidate is not None, "start comes before finish"
            assert attempt is not None, "start comes before finish"
            try:
                tensors = attempt.finish(_limit(candidate, deadline))
                self._log_use(candidate, attempt)
                return tensors
            except Exception as error:  # a transport's library may raise any
                raise_if_interrupt(error)
                if not self._give_up(candidate, attempt, error, deadline):
                    raise
            self.start(deadline)

    def park(self, keep: Callable[[bytes, AgentPull, int], bool]) -> None:
        """Leave a pull of the agent to a later fetch."""
        if isinstance(self._attempt, AgentTransfer):
            self._attempt.park(keep)

    def abandon(self) -> None:
        if self._attempt is not None:
            self._attempt.abandon()

    def _next(self) -> Candidate:
        reasons = []
        while self._left:
            candidate = self._left.pop(0)
            if candidate.serves:
                return candidate
            if candidate.kind is Kind.TRANSPORT and self._device_type != "cpu":
                self._log_unused(candidate.name, candidate.reason)
            reasons.append(f"{candidate.name}: {candidate.reason}")
        raise TransportUnavailable(
            f"no transport or lane can transfer this object: {'; '.join(reasons)}"
        )

    def _give_up(
        self, candidate: Candidate, attempt: Transfer, error: Exception, deadline: Deadline
    ) -> bool:
        """Give an attempt up if another candidate may be tried; else the caller raises its error.

        An error that is raised here would keep this frame, and this frame keeps the error.

        Raises:
            RDTError: Only ``RAY_RDT_STRICT_TRANSPORT=1`` is in the way.
        """
        if not may_fall_back(candidate, error, deadline.has_passed()):
            return False
        if any(other.serves for other in self._left):
            attempt.abandon()
            self._log_failure(candidate, attempt, error)
            return True
        is_strict = any(other.reason == STRICT for other in self._left)
        if not is_strict or isinstance(error, checksums.ChecksumMismatch):
            return False
        name = self._head.transport
        text = f"transport {name!r} cannot serve this object ({error}), and {STRICT}."
        raise RDTError(text) from error

    def _log_failure(self, candidate: Candidate, attempt: Transfer, error: Exception) -> None:
        if isinstance(error, checksums.ChecksumMismatch):
            checksums.log_retry(self._session, attempt.lane, error)
        elif candidate.kind is Kind.SHARED:
            why = f"{self._subject()}: memory is copied and not shared: {error}"
            self._session.log_once(why, logging.INFO)
        elif candidate.fallback is Fallback.IF_UNAVAILABLE:
            self._session.log_once(
                f"RDT transport {candidate.name!r} cannot serve {describe_peer(self._head)}: "
                f"{error}. Falling back to the next transport or lane."
            )
        elif candidate.fallback is Fallback.IF_FAILED:
            self._policy.failed(candidate.name, self._head.address, error)
            self._log_unused(candidate.name, str(error))
        else:
            logger.debug("RDT pulls an object again whose prefetch failed", exc_info=error)

    def _log_unused(self, name: str, reason: str) -> None:
        why = f"RDT lane {name} does not serve {describe_peer(self._head)}: {reason}"
        self._session.log_once(why, logging.INFO)

    def _log_use(self, candidate: Candidate, attempt: Transfer) -> None:
        """Log once for a peer which transport is used and why. The agent logs its lanes."""
        if candidate.kind is Kind.SHARED:
            self._session.log_once(f"{self._subject()}: lane {attempt.lane}", logging.INFO)
        elif candidate.kind is Kind.TRANSPORT:
            is_named = candidate.name == self._head.transport
            best = f"the best for {self._device_type} that serves this pair"
            why = "the named transport" if is_named else best
            what = f"{self._subject()}: lane {attempt.lane} ({why})"
            self._session.log_once(what, logging.INFO)

    def _subject(self) -> str:
        return f"RDT with {describe_peer(self._head)}, tensors on {self._device_type}"


def _limit(candidate: Candidate, deadline: Deadline) -> Deadline:
    """Leave half of the time to the candidates after one that the user did not name."""
    return deadline.halfway() if candidate.fallback is Fallback.IF_FAILED else deadline


def describe_peer(head: Descriptor) -> str:
    """Return the producer of an object as log lines and errors name it."""
    return f"producer {head.producer.hex()}"
