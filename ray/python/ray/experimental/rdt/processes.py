"""Other processes of this host, as the kernel knows them."""

from __future__ import annotations

import os
import select


class Process:
    """Tells when a process has ended, also when another one has got its number since.

    Args:
        pid: Its number. One that this process cannot see counts as ended.
    """

    def __init__(self, pid: int):
        try:
            self._descriptor = os.pidfd_open(pid)
        except OSError:
            self._descriptor = -1

    def has_ended(self) -> bool:
        """Runs on: any thread; does not block."""
        if self._descriptor < 0:
            return True
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Gives the kernel's handle back. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
