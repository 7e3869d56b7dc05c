"""Other processes of this host."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from select import POLLIN

from ray.experimental.rdt.common.real_threads import poll

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")


def pid_domain() -> str:
    """Return an ID of the processes that know each other by the same pids.

    It names the running kernel and the PID namespace.
    """
    return f"{_BOOT_ID.read_text().strip()}/{_PID_NAMESPACE.stat().st_ino}"


class Process:
    """A process of this host. A later process with the same pid is not confused with it.

    A pidfd identifies the process. Some containers refuse pidfds, and Pythons built for old kernels
    do not support them; then the start time identifies it. With a pidfd, /proc is not read, because
    it may hide the processes of other users. Several threads can use this object, which keeps the
    pidfd open.

    Args:
        pid: The pid. A process that does not exist counts as ended.
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
        """Tell whether the process has ended. Runs on: any thread; does not block."""
        if self._descriptor < 0:
            return not self._started or _started(self._pid) != self._started
        ended = poll()
        ended.register(self._descriptor, POLLIN)
        return bool(ended.poll(0))


def _started(pid: int) -> str:
    """Return a process's start time as /proc states it, "" if the process has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    # The program's name precedes it in parentheses and may contain any character.
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in ("Z", "X") else fields[18]
