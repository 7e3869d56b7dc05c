"""Other processes of this host, as the kernel knows them."""

from __future__ import annotations

import os
from select import POLLIN

from ray.experimental.rdt.real_threads import poll


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
        ended = poll()
        ended.register(self._descriptor, POLLIN)
        return bool(ended.poll(0))

    def close(self) -> None:
        """Gives the kernel's handle back. Idempotent."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
