"""Memory that a producer keeps for consumers which have it mapped.

A loan is named by the consumer, so that it can be given back whether or not its answer has come.
It ends when the consumer says so, when the consumer's process ends, or, if the consumer never
confirms it, soon after the deadline. A connection that breaks ends no loan whose process lives:
both are on one host, and the kernel tells the end of a process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.experimental.rdt.common import real_threads as threading
from ray.experimental.rdt.common.deadline import Deadline
from ray.experimental.rdt.common.processes import Process

#: A consumer gives up at its deadline; what it says of that may take so much longer.
_SLACK_S = 5.0


@dataclass
class _Loan:
    """What is kept for one consumer.

    Attributes:
        reader: Its agent.
        kept: The memory, and what else it uses.
        until: When the loan ends if the consumer has not confirmed it; None if it has.
    """

    reader: bytes
    kept: Sequence[Any]
    until: Deadline | None


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
        self, name: str, reader: bytes, pid: int, kept: Sequence[Any], deadline: Deadline
    ) -> None:
        """Keeps memory until the consumer says otherwise."""
        with self._lock:
            if self._ended_early.pop(name, None) is not None:
                return  # given back before it was lent
            self._loans[name] = _Loan(reader, kept, deadline.later(_SLACK_S))
            if reader not in self._processes:
                self._processes[reader] = Process(pid)

    def confirm(self, name: str) -> None:
        """The consumer has mapped the memory: the loan has no deadline any more."""
        with self._lock:
            loan = self._loans.get(name)
            if loan is not None:
                loan.until = None

    def end(self, name: str) -> None:
        """The consumer has given the memory back."""
        with self._lock:
            loan = self._loans.pop(name, None)
            if loan is None:
                self._ended_early[name] = Deadline.after(_SLACK_S)

    def look_after(self) -> None:
        """Ends loans whose consumers have ended or never confirmed. Runs on: the reaper thread."""
        ended = self._ended_processes()

        def is_over(loan: _Loan) -> bool:
            return loan.reader in ended or (loan.until is not None and loan.until.has_passed())

        self._drop(is_over)
        with self._lock:
            self._ended_early = {
                name: until for name, until in self._ended_early.items() if not until.has_passed()
            }

    def on_peer_lost(self, peer_id: bytes) -> None:
        """Ends the loans of a consumer whose process has ended. Runs on: the reaper thread."""
        with self._lock:
            process = self._processes.get(peer_id)
        if process is not None and process.has_ended():
            self._drop(lambda loan: loan.reader == peer_id)

    def _ended_processes(self) -> set[bytes]:
        with self._lock:
            return {reader for reader, process in self._processes.items() if process.has_ended()}

    def _drop(self, is_over: Callable[[_Loan], bool]) -> None:
        with self._lock:
            over = [name for name, loan in self._loans.items() if is_over(loan)]
            dropped = [self._loans.pop(name) for name in over]
            readers = {loan.reader for loan in self._loans.values()}
            for reader in [each for each in self._processes if each not in readers]:
                del self._processes[reader]
        dropped.clear()  # memory is freed without the lock
