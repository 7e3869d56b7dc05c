"""Describe the machine of a result."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

PACKAGES = ("ray", "torch", "nixl", "numpy")


def describe_machine() -> dict[str, str]:
    """Return the machine's facts that matter for a benchmark; name to text."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = os.getloadavg()[0]
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory / (1 << 30):.1f} GiB",
        "huge pages": _huge_pages(),
        "kernel": f"{platform.system()} {platform.release()}",
        "load when started": f"{load:.2f}",
    }


def describe_python(python: Path) -> str:
    """Return a Python's version and its relevant packages."""
    program = (
        "import sys, importlib.metadata as m\n"
        f"names = [n for n in {PACKAGES} if any(True for _ in m.distributions(name=n))]\n"
        "print('Python', sys.version.split()[0], *(f'{n} {m.version(n)}' for n in names))"
    )
    found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def _huge_pages() -> str:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = re.search(r"\[(\w+)\]", setting.read_text()) if setting.exists() else None
    return chosen[1] if chosen else "unknown"
