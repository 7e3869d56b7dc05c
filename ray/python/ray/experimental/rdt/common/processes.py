"""Other processes of this host, as the kernel knows them."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from select import POLLIN

from ray.experimental.rdt.common.real_threads import poll


class Process:
    """Tells when a process has ended, also when another one has got its number since.

    Some containers refuse the kernel's handle for that (a pidfd), and Pythons built for old kernels
    have no call for it; then the time at which the process was started tells it apart. Where there
    is a handle, /proc is not asked: it may hide the processes of other users. The handle lives as
    long as this object: a thread may look while another one gives it up.

    Args:
        pid: Its number. One that is not there counts as ended.
    """

    def __init__(self, pid: int):
        self._pid = pid
        self._descriptor, self._started = -1, ""
        try:
            self._descriptor = os.pidfd_open(pid)
        except (OSError, AttributeError):
            self._started = _started(pid)
        else:
            weakref.finalize(self, os.close, self._descriptor)

    def has_ended(self) -> bool:
        """Runs on: any thread; does not block."""
        if self._descriptor < 0:
            return not self._started or _started(self._pid) != self._started
        ended = poll()
        ended.register(self._descriptor, POLLIN)
        return bool(ended.poll(0))


def _started(pid: int) -> str:
    """When a process was started, in the kernel's words; "" if it is not there or has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The name of the program comes before and may hold anything, in parentheses.
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in ("Z", "X") else fields[18]
