"""Memory that a producer keeps for consumers that have mapped it.

The consumer chooses the ID of a loan, so that it can end the loan even if the answer is lost. A
loan ends when the consumer ends it, when the consumer's process ends, or, if the consumer never
confirms it, soon after the deadline. A broken connection does not end the loan of a live process:
both are on one host, and the kernel reports the end of a process.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.processes import Process

#: A consumer gives up at its deadline. Its report of that may take this much longer.
_SLACK_S = 5.0


@dataclass
class _Loan:
    """Memory kept for one consumer.

    Attributes:
        consumer: Its agent.
        kept: The memory, and objects that it depends on.
        until: When the loan ends if the consumer has not confirmed it; None if it has.
    """

    consumer: bytes
    kept: Sequence[Any]
    until: Deadline | None

    def is_over(self, ended_consumers: Collection[bytes]) -> bool:
        """Tell whether it ends without a word of the consumer."""
        has_expired = self.until is not None and self.until.has_passed()
        return has_expired or self.consumer in ended_consumers


class Loans:
    """The loans of one process over one transport. Thread-safe; nothing blocks."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loans: dict[str, _Loan] = {}
        self._processes: dict[bytes, Process] = {}
        self._ended_early: dict[str, Deadline] = {}

    def __len__(self) -> int:
        return len(self._loans)

    def add(
        self, name: str, consumer: bytes, pid: int, kept: Sequence[Any], deadline: Deadline
    ) -> None:
        """Keep memory until the loan ends."""
        with self._lock:
            if self._ended_early.pop(name, None) is not None:
                return  # it ended before it began
            self._loans[name] = _Loan(consumer, kept, deadline.later(_SLACK_S))
            if consumer not in self._processes:
                self._processes[consumer] = Process(pid)

    def confirm(self, name: str) -> None:
        """Remove the deadline of a loan: the consumer has mapped the memory."""
        with self._lock:
            loan = self._loans.get(name)
            if loan is not None:
                loan.until = None

    def end(self, name: str) -> None:
        """End a loan."""
        with self._lock:
            loan = self._loans.pop(name, None)
            if loan is None:
                self._ended_early[name] = Deadline.after(_SLACK_S)

    def end_expired(self) -> None:
        """End loans that were not confirmed in time or whose consumers have ended.

        Runs on: the reaper thread.
        """
        with self._lock:
            processes = list(self._processes.items())
        ended = {consumer for consumer, process in processes if process.has_ended()}
        with self._lock:
            over = [name for name, loan in self._loans.items() if loan.is_over(ended)]
            dropped = [self._loans.pop(name) for name in over]
            consumers = {loan.consumer for loan in self._loans.values()}
            self._processes = {c: p for c, p in self._processes.items() if c in consumers}
            self._ended_early = {
                name: until for name, until in self._ended_early.items() if not until.has_passed()
            }
        dropped.clear()  # memory is freed without the lock
